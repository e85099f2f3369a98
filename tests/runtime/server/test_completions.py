"""``/v1/completions`` over real HTTP, with the official client."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest

from runtime.requests import SamplingParameters, TokenEvent

MODEL = "team/demo"
TEXT = "naïve 专家混合 😀🎉 fox"


def events_of(text: str) -> list[str]:
    """The data of each event of a stream, and nothing else in it."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [event.removeprefix("data: ") for event in events]


def test_one_completion(server: Any) -> None:
    server.script(TEXT)
    answer = server.client.completions.create(model=MODEL, prompt="The quick", max_tokens=60, temperature=0)
    tokens = server.tokenizer.encode("The quick")
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert [(c.index, c.text, c.finish_reason) for c in answer.choices] == [(0, TEXT, "stop")]
    generated = len(server.tokenizer.encode(TEXT))
    assert answer.usage.to_dict() == {
        "prompt_tokens": len(tokens),
        "completion_tokens": generated,
        "total_tokens": len(tokens) + generated,
    }
    assert server.engine.submitted == [(tokens, SamplingParameters(temperature=0, max_tokens=60))]
    assert server.engine.cancelled == []


def test_sampling_parameters_reach_the_engine(server: Any) -> None:
    server.client.completions.create(
        model=MODEL, prompt="a", temperature=0.5, top_p=0.9, seed=7, max_tokens=3, extra_body={"ignore_eos": True}
    )
    server.client.completions.create(model=MODEL, prompt="a")
    assert [sampling for _, sampling in server.engine.submitted] == [
        SamplingParameters(temperature=0.5, top_p=0.9, seed=7, max_tokens=3, ignore_eos=True),
        SamplingParameters(temperature=1.0, top_p=1.0, seed=None, max_tokens=16, ignore_eos=False),
    ]


def test_length(server: Any) -> None:
    server.script(TEXT)
    answer = server.client.completions.create(model=MODEL, prompt="a", max_tokens=4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == server.tokenizer.decode(server.tokenizer.encode(TEXT)[:4])
    assert answer.usage.completion_tokens == 4


def test_half_a_character_at_the_end(server: Any) -> None:
    server.script(server.tokenizer.encode("a😀")[:-1])
    answer = server.client.completions.create(model=MODEL, prompt="a")
    assert answer.choices[0].text == "a\ufffd"


@pytest.mark.parametrize("prompt", [["one", "two"], [[5, 6], [7]], ["one", [7]]], ids=["texts", "token lists", "both"])
def test_several_prompts(server: Any, prompt: Any) -> None:
    server.script("first", "second")
    answer = server.post("/v1/completions", prompt=prompt).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "first"), (1, "second")]
    given = [server.tokenizer.encode(item) if isinstance(item, str) else item for item in prompt]
    assert [tokens for tokens, _ in server.engine.submitted] == given
    assert answer["usage"]["prompt_tokens"] == sum(map(len, given))


def test_token_ids_as_prompt(server: Any) -> None:
    server.client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert server.engine.submitted[0][0] == [5, 6, 7]


def test_copies_have_seeds_of_their_own(server: Any) -> None:
    server.script("x", "y", "z", "w")
    answer = server.client.completions.create(model=MODEL, prompt=["one", "two"], n=2, seed=5)
    assert [choice.text for choice in answer.choices] == ["x", "y", "z", "w"]
    assert [sampling.seed for _, sampling in server.engine.submitted] == [5, 6, 5, 6]


def test_stream(server: Any) -> None:
    server.script(TEXT)
    stream = server.client.completions.create(
        model=MODEL, prompt="a", max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    *pieces, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == TEXT
    assert len(pieces) > 5
    assert all("\ufffd" not in chunk.choices[0].text for chunk in pieces)
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in pieces)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(server.tokenizer.encode(TEXT))


def test_stream_on_the_wire(server: Any) -> None:
    server.script("fox")
    response = server.post("/v1/completions", prompt="a", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_stream_of_several_prompts(server: Any) -> None:
    server.script("first", "second")
    stream = server.client.completions.create(model=MODEL, prompt=["a", "b"], stream=True)
    texts, reasons = {0: "", 1: ""}, {}
    for chunk in stream:
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert (texts, reasons) == ({0: "first", 1: "second"}, {0: "stop", 1: "stop"})


def test_text_arrives_before_the_end(server: Any) -> None:
    gate = threading.Event()
    server.script([*server.tokenizer.encode("fox"), gate, *server.tokenizer.encode("dog")])
    stream = iter(server.client.completions.create(model=MODEL, prompt="a", stream=True))
    text = ""
    while text != "fox":
        text += next(stream).choices[0].text
    gate.set()
    assert "".join(chunk.choices[0].text for chunk in stream) == "dog"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(server: Any, stream: bool) -> None:
    gate = threading.Event()
    server.script([*server.tokenizer.encode("The dog 😀 sleeps. EN"), *server.tokenizer.encode("D more"), gate])
    answer = server.client.completions.create(model=MODEL, prompt="a", max_tokens=60, stop=["END", "zz"], stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == "The dog 😀 sleeps. "
    assert choices[-1].finish_reason == "stop"
    # The script waits at its gate, so only the server can have ended the request.
    assert server.engine.cancel_seen.wait(5)
    assert server.engine.cancelled == [0]


def test_beginning_of_a_stop_string_at_the_end_is_text(server: Any) -> None:
    server.script("dog EN")
    answer = server.client.completions.create(model=MODEL, prompt="a", stop="END")
    assert answer.choices[0].text == "dog EN"


def test_stop_string_ends_one_choice_only(server: Any) -> None:
    server.script("one. two", "three four")
    answer = server.client.completions.create(model=MODEL, prompt=["a", "b"], stop=".")
    assert [choice.text for choice in answer.choices] == ["one", "three four"]


def test_client_that_goes_away_ends_its_requests(server: Any) -> None:
    server.script([5, 6, threading.Event()], [5, 6, threading.Event()])
    stream = server.client.completions.create(model=MODEL, prompt=["a", "b"], stream=True)
    next(iter(stream))
    stream.close()
    assert server.engine.cancel_seen.wait(5)
    wait_for(lambda: sorted(server.engine.cancelled) == [0, 1])


def test_client_that_goes_away_without_a_stream(server: Any) -> None:
    server.script([5, threading.Event()])
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.1).completions.create(model=MODEL, prompt="a")
    assert server.engine.cancel_seen.wait(5)


def wait_for(condition: Any) -> None:
    tick = threading.Event()
    for _ in range(500):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError("the condition did not come true")


def test_engine_error_in_a_stream(server: Any) -> None:
    server.script([5, 6, TokenEvent(None, "error", "rank 1 died")])
    response = server.post("/v1/completions", prompt="a", stream=True)
    *_, last = events_of(response.text)
    assert "[DONE]" not in response.text
    assert json.loads(last) == {
        "error": {
            "message": "the generation failed: rank 1 died",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    server.script([5, 6, TokenEvent(None, "error", "rank 1 died")])
    with pytest.raises(openai.APIError, match="rank 1 died"):
        list(server.client.completions.create(model=MODEL, prompt="a", stream=True))


@pytest.mark.parametrize(("ready", "status"), [(True, 500), (False, 503)])
def test_engine_error_without_a_stream(server: Any, ready: bool, status: int) -> None:
    server.script([5, TokenEvent(None, "error", "rank 1 died")], [5, threading.Event()])
    server.engine.ready = ready
    response = server.post("/v1/completions", prompt=["a", "b"])
    assert response.status_code == status
    assert "rank 1 died" in response.json()["error"]["message"]
    assert server.engine.cancelled == [1]


def test_engine_that_cancels(server: Any) -> None:
    server.script([5, TokenEvent(None, "cancelled")])
    response = server.post("/v1/completions", prompt="a")
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the generation failed: the engine cancelled the request"


def test_requests_run_together(server: Any) -> None:
    gate = threading.Event()
    server.script([gate, *server.tokenizer.encode("slow")], "fast")
    first = iter(
        server.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}], stream=True)
    )
    next(first)
    assert server.client.completions.create(model=MODEL, prompt="b").choices[0].text == "fast"
    gate.set()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in first) == "slow"
