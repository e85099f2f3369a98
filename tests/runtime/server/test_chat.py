"""``/v1/chat/completions`` over real HTTP, with the official client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.runtime.server.scripted_engine import byte_level_tokenizer

MODEL = "team/demo"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 😀"}]
TEXT = "The fox 专家 😀"


def test_one_answer(server: Any) -> None:
    server.script(TEXT)
    answer = server.client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    prompt = server.tokenizer.encode("<|system|>Be brief.\n<|user|>你好 😀\n<|assistant|>")
    tokens, sampling = server.engine.submitted[0]
    assert tokens == prompt
    assert sampling.max_tokens == server.engine.max_context - len(prompt)
    assert answer.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_stream(server: Any, name: str) -> None:
    server.script(TEXT)
    stream = server.client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **{name: 3}
    )
    first, *pieces, end, usage = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content for chunk in pieces)
    assert text == server.tokenizer.decode(server.tokenizer.encode(TEXT)[:3])
    assert end.choices[0].finish_reason == "length"
    assert end.choices[0].delta.content is None
    assert usage.usage.completion_tokens == 3


def test_stop_string_and_copies(server: Any) -> None:
    server.script("one. two", "three. four")
    answer = server.client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=".", n=2)
    assert [choice.message.content for choice in answer.choices] == ["one", "three"]


def test_content_in_parts(server: Any) -> None:
    parts: Any = [{"type": "text", "text": "The fox"}, {"type": "text", "text": "sleeps."}]
    server.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert server.engine.submitted[0][0] == server.tokenizer.encode("<|user|>The fox\nsleeps.\n<|assistant|>")


def test_refusal_by_the_template(server: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="no developer role"):
        server.client.chat.completions.create(model=MODEL, messages=[{"role": "developer", "content": "a"}])


def test_tokenizer_without_template(serve: Callable[..., Any]) -> None:
    server = serve(byte_level_tokenizer(chat_template=None))
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        server.client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert server.engine.submitted == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "messages is missing"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hello"}, "messages", "a valid list, got 'hello'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "got 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "got None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "only text is supported",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls",
            "is not supported",
        ),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools", "tools are not called here"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format", "free text"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"messages": MESSAGES, "logprobs": 3}, "logprobs", "a valid boolean, got 3"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "got 21"),
        ({"messages": MESSAGES, "best_of": 2}, "best_of", "is not supported"),
        ({"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        ({"messages": MESSAGES, "max_tokens": 60}, "max_tokens", "the context is 64"),
    ],
)
def test_bad_requests(server: Any, body: dict[str, Any], param: str, words: str) -> None:
    response = server.post("/v1/chat/completions", **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert server.engine.submitted == []


def test_harmless_and_neutral_parameters_are_accepted(server: Any) -> None:
    neutral = {"user": "u", "metadata": {"a": "b"}, "tools": [], "logprobs": False, "response_format": {"type": "text"}}
    response = server.post("/v1/chat/completions", messages=MESSAGES, presence_penalty=0.0, top_k=None, **neutral)
    assert response.status_code == 200
