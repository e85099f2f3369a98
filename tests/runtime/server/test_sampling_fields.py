"""Sampling over real HTTP with the official client: fields reach the engine, tokens and log-probabilities come back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from runtime.requests import SamplingParameters
from runtime.server.token_texts import TokenTexts
from tests.runtime.server.scripted_engine import byte_fallback_tokenizer, byte_level_tokenizer, scripted_logprobs

MODEL = "team/demo"
MESSAGES: Any = [{"role": "user", "content": "a"}]
TEXT = "The 😀 fox"


def test_every_field_reaches_the_engine(server: Any) -> None:
    others: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "stop_token_ids": [7, 9],
    }
    fields: dict[str, Any] = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "logit_bias": {"5": 10, "6": -2.5},
        "user": "u",
    }
    expected = SamplingParameters(
        **{**others, "stop_token_ids": (7, 9)},
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias=((5, 10), (6, -2.5)),
        max_tokens=8,
        seed=3,
        logprobs=4,
    )
    server.client.completions.create(
        model=MODEL, prompt="a", max_tokens=8, seed=3, logprobs=4, best_of=1, extra_body=others, **fields
    )
    server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, seed=3, logprobs=True, top_logprobs=4, extra_body=others, **fields
    )
    assert [sampling for _, sampling in server.engine.submitted] == [expected, expected]
    assert server.engine.users == ["u", "u"]


def test_values_that_ask_for_nothing(server: Any) -> None:
    nothing: dict[str, Any] = {
        "top_k": -1,
        "min_p": None,
        "logit_bias": {},
        "stop_token_ids": [],
        "ignore_eos": None,
        "logprobs": None,
    }
    assert server.post("/v1/completions", prompt="a", **nothing).status_code == 200
    chat = {"logprobs": False, "top_logprobs": 0, "min_tokens": 0}
    assert server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=16, **chat).status_code == 200
    assert {sampling for _, sampling in server.engine.submitted} == {SamplingParameters()}


def test_seeds_of_copies_stay_within_64_bits(server: Any) -> None:
    server.client.completions.create(model=MODEL, prompt="a", n=2, seed=2**63 - 1)
    assert [sampling.seed for _, sampling in server.engine.submitted] == [2**63 - 1, -(2**63)]


def test_stop_strings_count_only_after_min_tokens(server: Any) -> None:
    tokens = server.tokenizer.encode("dog. dog. dog.")
    minimum = len(server.tokenizer.encode("dog."))
    server.script(tokens, tokens)
    answer = server.client.completions.create(
        model=MODEL, prompt=["a", "b"], stop=".", extra_body={"min_tokens": minimum}
    )
    assert [choice.text for choice in answer.choices] == ["dog. dog"] * 2


def expected_entry(tokenizer: Any, token: int) -> dict[str, Any]:
    texts, found = TokenTexts(tokenizer), scripted_logprobs(token, 3)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": texts.text_of(token_id), "logprob": logprob, "bytes": list(texts.bytes_of(token_id))}

    return entry(token, found.chosen) | {"top_logprobs": [entry(*pair) for pair in found.top]}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(server: Any, stream: bool) -> None:
    server.script(TEXT)
    answer = server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=stream
    )
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        # Every entry comes with the text in which it begins.
        assert all(choice.delta.content for choice in choices if choice.logprobs)
    else:
        entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == TEXT
    tokens = server.tokenizer.encode(TEXT)
    assert [entry.to_dict() for entry in entries] == [expected_entry(server.tokenizer, token) for token in tokens]
    assert any(entry.token.startswith("\\x") for entry in entries), "a part of 😀 is no text"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(server: Any, stream: bool) -> None:
    server.script(TEXT)
    answer = server.client.completions.create(model=MODEL, prompt="a", logprobs=1, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    offsets = [offset for part in parts for offset in part.text_offset]
    texts = [text for part in parts for text in part.tokens]
    tops = [top for part in parts for top in part.top_logprobs]
    tokens = server.tokenizer.encode(TEXT)
    assert [value for part in parts for value in part.token_logprobs] == [-1.5] * len(tokens)
    named = TokenTexts(server.tokenizer)
    for token, text, top in zip(tokens, texts, tops, strict=True):
        assert text == named.text_of(token, "bytes:")
        assert top == {named.text_of(token + 1, "bytes:"): -0.5, text: -1.5}, "the token itself is among them"
    before = b""
    for offset, token in zip(offsets, tokens, strict=True):
        assert offset == len(before.decode(errors="ignore")), "whole characters before the token"
        before += named.bytes_of(token)
    assert any(text.startswith("bytes:") for text in texts)


@pytest.mark.parametrize("stream", [False, True])
def test_no_logprobs_of_what_a_stop_string_cuts_off(server: Any, stream: bool) -> None:
    server.script([*server.tokenizer.encode("The dog"), *server.tokenizer.encode("END and more")])
    answer = server.client.completions.create(model=MODEL, prompt="a", logprobs=0, stop="END", stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "The dog"
    tokens = [text for choice in choices for text in choice.logprobs.tokens]
    assert "".join(tokens) == "The dog"
    top = [entry for choice in choices for entry in choice.logprobs.top_logprobs]
    assert top == [{text: -1.5} for text in tokens]


def test_logprobs_of_a_token_without_text_come_at_the_end(server: Any) -> None:
    script = [*server.tokenizer.encode("fox"), server.tokenizer.pad_token_id]
    server.script(script, script)
    answer = server.client.completions.create(model=MODEL, prompt="a", logprobs=0)
    assert answer.choices[0].logprobs.tokens[-1] == "<pad>"
    *_, last = server.client.completions.create(model=MODEL, prompt="a", logprobs=0, stream=True)
    assert (last.choices[0].finish_reason, last.choices[0].logprobs.tokens) == ("stop", ["<pad>"])


def test_logprobs_of_copies_stay_with_their_choice(server: Any) -> None:
    server.script("one", "two two")
    chunks = server.client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, logprobs=True, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += "".join(entry.token for entry in choice.logprobs.content) if choice.logprobs else ""
    assert texts == {0: "one", 1: "two two"}


def test_answers_without_logprobs_say_null(server: Any) -> None:
    server.script("fox", "fox")
    assert server.post("/v1/completions", prompt="a").json()["choices"][0]["logprobs"] is None
    events = server.post("/v1/chat/completions", messages=MESSAGES, stream=True).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_bytes_of_tokens_make_up_the_text(make: Any) -> None:
    tokenizer = make()
    texts = TokenTexts(tokenizer)
    ids = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    for first, second in zip(ids, ids[7:], strict=False):
        whole = tokenizer.decode([first, second], clean_up_tokenization_spaces=False)
        joined = texts.bytes_of(first) + texts.bytes_of(second)
        if "\ufffd" not in whole:  # a token alone may be no text
            assert joined.decode().lstrip() == whole.lstrip()
    assert texts.bytes_of(10**6) == b""
    assert texts.text_of(tokenizer.eos_token_id) == tokenizer.eos_token


def test_text_of_parts_of_characters() -> None:
    tokenizer = byte_fallback_tokenizer()
    texts = TokenTexts(tokenizer)
    token = tokenizer.convert_tokens_to_ids("<0xF0>")
    assert (texts.bytes_of(token), texts.text_of(token), texts.text_of(token, "bytes:")) == (
        b"\xf0",
        "\\xf0",
        "bytes:\\xf0",
    )
    assert texts.text_of(tokenizer.convert_tokens_to_ids("▁dog")) == " dog"
