"""Incremental detokenisation against the tokenizer's own decoding."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from runtime.server.detokenizer import ByteLevelDetokenizer, ByteLevelVocabulary, DetokenizerFactory, WindowDetokenizer
from tests.runtime.server.scripted_engine import byte_fallback_tokenizer, byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
BYTE_FALLBACK = byte_fallback_tokenizer()
BYTE_LEVEL_FACTORY = DetokenizerFactory(BYTE_LEVEL)
VOCABULARY = ByteLevelVocabulary(BYTE_LEVEL, frozenset(BYTE_LEVEL.all_special_ids))
BYTE_FALLBACK_FACTORY = DetokenizerFactory(BYTE_FALLBACK)


def decode(tokenizer: Any, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def pieces_of(factory: DetokenizerFactory, token_ids: list[int]) -> list[str]:
    detokenizer = factory()
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def test_kinds() -> None:
    assert isinstance(BYTE_LEVEL_FACTORY(), ByteLevelDetokenizer)
    assert isinstance(BYTE_FALLBACK_FACTORY(), WindowDetokenizer)


# Two ids beyond the vocabulary: a model's output may be wider than its tokenizer.
@given(st.lists(st.integers(0, len(BYTE_LEVEL) + 1), max_size=40))
@settings(max_examples=500)
def test_byte_level_random_tokens(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL_FACTORY, token_ids)) == decode(BYTE_LEVEL, token_ids)


@given(st.binary(max_size=24))
@settings(max_examples=500)
def test_byte_level_random_bytes(content: bytes) -> None:
    token_of = {VOCABULARY.token_bytes(i): i for i in range(len(BYTE_LEVEL))}
    token_ids = [token_of[content[i : i + 1]] for i in range(len(content))]
    pieces = pieces_of(BYTE_LEVEL_FACTORY, token_ids)
    assert "".join(pieces) == decode(BYTE_LEVEL, token_ids) == content.decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_byte_level_text_arrives_in_whole_characters_at_once(text: str) -> None:
    token_ids = BYTE_LEVEL.encode(text)
    detokenizer = BYTE_LEVEL_FACTORY()
    sent = ""
    for count, token_id in enumerate(token_ids, start=1):
        sent += detokenizer.push(token_id)
        so_far = b"".join(VOCABULARY.token_bytes(i) for i in token_ids[:count])
        assert sent == so_far.decode("utf-8", "ignore")
    assert detokenizer.flush() == ""
    assert sent == text


byte_ids = st.integers(3, 258)
piece_ids = st.sampled_from([0, 1, 2, *range(259, len(BYTE_FALLBACK))])
valid_bytes = st.text(min_size=1, max_size=3).map(lambda text: [3 + byte for byte in text.encode()])


@given(st.lists(st.one_of(byte_ids.map(lambda i: [i]), piece_ids.map(lambda i: [i]), valid_bytes), max_size=20))
@settings(max_examples=500)
def test_byte_fallback_random_tokens(groups: list[list[int]]) -> None:
    token_ids = [token_id for group in groups for token_id in group]
    assert "".join(pieces_of(BYTE_FALLBACK_FACTORY, token_ids)) == decode(BYTE_FALLBACK, token_ids)


def test_byte_fallback_holds_a_run_of_bytes_only() -> None:
    ids = BYTE_FALLBACK.get_vocab()
    tokens = ["▁the", "▁dog", "<0xE4>", "<0xB8>", "<0xAD>", "s", "▁", "▁", "▁the"]
    pieces = pieces_of(BYTE_FALLBACK_FACTORY, [ids[token] for token in tokens])
    assert pieces == ["the", " dog", "", "", "", "中s", " ", " ", " the", ""]


def test_long_run_of_replacement_characters_costs_few_decodings(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_with_decoder(models.WordLevel({"\ufffd": 0, "a": 1}, unk_token="a"), decoders.Fuse())
    )
    factory = DetokenizerFactory(tokenizer)
    sizes: list[int] = []
    original = tokenizer.decode

    def counting(token_ids: list[int], **settings: Any) -> str:
        sizes.append(len(token_ids))
        return str(original(token_ids, **settings))

    monkeypatch.setattr(tokenizer, "decode", counting)
    token_ids = [0] * 1000 + [1]
    assert "".join(pieces_of(factory, token_ids)) == "\ufffd" * 1000 + "a"
    assert sum(sizes) < 10 * len(token_ids)


def _with_decoder(model: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return tokenizer
