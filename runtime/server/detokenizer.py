"""Turns a stream of tokens into a stream of text that is, when joined, exactly the tokenizer's own decoding.

The reference is ``tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)``.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
# Tokens of context that a decoder may need to place the next one (a stripped space at the start of the text).
MAX_CONTEXT_TOKENS = 8


class Detokenizer(Protocol):
    """Text of one sequence of tokens, piece by piece."""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; never a part of a character."""
        ...

    def flush(self) -> str:
        """What is left at the end of the sequence, such as a replacement character for half a character."""
        ...


class DetokenizerFactory:
    """Makes the detokenizer that fits a tokenizer, one per sequence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special_ids = frozenset(_special_ids(tokenizer))
        kinds = decoder_kinds(tokenizer)
        self._byte_level = ByteLevelVocabulary(tokenizer, self._special_ids) if kinds == ["ByteLevel"] else None
        self._byte_ids = frozenset(_byte_fallback_ids(tokenizer) if "ByteFallback" in kinds else ())

    def __call__(self) -> Detokenizer:
        """A detokenizer for a new sequence."""
        if self._byte_level is not None:
            return ByteLevelDetokenizer(self._byte_level)
        return WindowDetokenizer(self._tokenizer, self._special_ids, self._byte_ids)


class ByteLevelVocabulary:
    """The bytes of every token of a byte-level tokenizer, looked up once each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_ids: frozenset[int]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._byte_of = {character: byte for byte, character in _byte_level_alphabet().items()}
        self._bytes: dict[int, bytes] = dict.fromkeys(special_ids, b"")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for a special token or an id that has no token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        # An added token may be written in plain text, outside the alphabet: it stands for itself.
        if all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        return token.encode()


class ByteLevelDetokenizer:
    """For byte-level BPE: the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, vocabulary: ByteLevelVocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See ``Detokenizer``."""
        return self._decoder.decode(self._vocabulary.token_bytes(token_id))

    def flush(self) -> str:
        """See ``Detokenizer``."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other tokenizer: decodes a short window of tokens and hands out what it adds to the window's beginning.

    Tokens are held while the last one is a single byte (``<0x..>``: a run of them is decoded as a whole, and turns
    into replacement characters as a whole if any is wrong) or while the text ends with a replacement character.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_ids: frozenset[int], byte_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._byte_ids = byte_ids
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []
        self._next_attempt = 1

    def push(self, token_id: int) -> str:
        """See ``Detokenizer``."""
        if token_id in self._special_ids:
            return ""
        self._held.append(token_id)
        if token_id in self._byte_ids or len(self._held) < self._next_attempt:
            return ""
        text = self._decode(self._context + self._held)
        if text.endswith(REPLACEMENT):
            # Geometric spacing keeps the cost per token constant, should the model write nothing else.
            self._next_attempt = len(self._held) + max(1, len(self._held) // 4)
            return ""
        return self._hand_out(text)

    def flush(self) -> str:
        """See ``Detokenizer``."""
        return self._hand_out(self._decode(self._context + self._held)) if self._held else ""

    def _hand_out(self, text: str) -> str:
        new = text[len(self._context_text) :]
        held_text = self._decode(self._held)
        # A context without text would lose its place: the next token would be decoded as if it began the text.
        self._context = self._held if held_text else (self._context + self._held)[-MAX_CONTEXT_TOKENS:]
        self._context_text = held_text or self._decode(self._context)
        self._held = []
        self._next_attempt = 1
        return new

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that ``skip_special_tokens`` leaves out, found by decoding each added token with and without it."""

    def decode(token_id: int, skip: bool) -> str:
        return str(tokenizer.decode([token_id], skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    return [
        token_id for token_id in tokenizer.added_tokens_decoder if decode(token_id, False) != decode(token_id, True)
    ]


def decoder_kinds(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the steps of the tokenizer's decoder in the tokenizers library; none for a tokenizer in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return []
    # The state of a decoder is its part of tokenizer.json; the library has no other way to look into a sequence.
    description: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return [step["type"] for step in description.get("decoders", [description])]


def _byte_fallback_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that stand for one byte, ``<0x00>`` to ``<0xFF>``."""
    byte_token = re.compile(r"<0x[0-9A-Fa-f]{2}>")
    return [token_id for token, token_id in tokenizer.get_vocab().items() if byte_token.fullmatch(token)]


def _byte_level_alphabet() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte: itself where printable, else one from 256 on.

    Source: GPT-2's byte encoder, as the tokenizers library's ``ByteLevel`` has it.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(rest)}
