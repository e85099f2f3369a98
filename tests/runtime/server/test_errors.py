"""Malformed requests and a failing engine: a 4xx or 5xx in OpenAI's shape, one line, and nothing submitted."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

MODEL = "team/demo"
PATH = "/v1/completions"
JSON = {"content-type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    return error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{prompt: 1}", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b"[" * 100_000, "pars"),
        (b"", "JSON object"),
        (b"[1, 2]", "JSON object"),
        (b'"text"', "JSON object"),
        (b"null", "JSON object"),
        (b'\xff\xfe{"prompt": "a"}', "pars"),
    ],
)
def test_body_that_is_no_json_object(server: Any, content: bytes, words: str) -> None:
    error = error_of(server.http.post(PATH, content=content, headers=JSON), 400)
    assert words in error["message"]


def test_wrong_content_type(server: Any) -> None:
    error = error_of(server.http.post(PATH, data={"prompt": "a"}), 400)
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "got None"),
        ({"prompt": 3}, "prompt", "expected a string, a list of token ids"),
        ({"prompt": []}, "prompt", "got []"),
        ({"prompt": [[]]}, "prompt", "got [[]]"),
        ({"prompt": [1, "a"]}, "prompt", "got [1, 'a']"),
        ({"prompt": [True]}, "prompt", "got [True]"),
        ({"prompt": {"text": "a"}}, "prompt", "got {'text': 'a'}"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": [5, 100_000]}, "prompt", "token id 100000"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [5] * 64}, "prompt", "the prompt has 64 tokens, the context 64"),
        ({"prompt": [5] * 60, "max_tokens": 5}, "max_tokens", "60 prompt tokens + 5 max_tokens = 65"),
        ({"prompt": [[5]] * 200, "n": 2}, "n", "400 choices"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        ({"max_tokens": "5"}, "max_tokens", "a valid integer, got '5'"),
        ({"max_tokens": 1.5}, "max_tokens", "a valid integer, got 1.5"),
        ({"max_tokens": True}, "max_tokens", "a valid integer, got True"),
        ({"temperature": -0.1}, "temperature", "got -0.1"),
        ({"temperature": "hot"}, "temperature", "a valid number, got 'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0, got 0"),
        ({"top_p": 1.1}, "top_p", "got 1.1"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"n": 0}, "n", "got 0"),
        ({"stream": "yes"}, "stream", "a valid boolean, got 'yes'"),
        ({"stop": ""}, "stop", "none empty"),
        ({"stop": ["a", ""]}, "stop", "none empty"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": 3}, "stop", "got 3"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for streams only"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
        ({"logprobs": True}, "logprobs", "a valid integer, got True"),
        ({"top_logprobs": 2}, "top_logprobs", "is not supported"),
        ({"echo": True}, "echo", "is not supported"),
        ({"best_of": 3, "n": 2}, "best_of", "best_of 3 is not n, 2"),
        ({"suffix": "end"}, "suffix", "is not supported"),
        ({"logit_bias": {"dog": 1}}, "logit_bias", "token ids as keys, got 'dog'"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "got '05'"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100 for token 5, got 101"),
        ({"logit_bias": {"5": "1"}}, "logit_bias", "got '1'"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "token id 100000 is not within"),
        ({"logit_bias": [5]}, "logit_bias", "got [5]"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "at most 300"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2, got 2.5"),
        ({"presence_penalty": "much"}, "presence_penalty", "a valid number, got 'much'"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01, got 0"),
        ({"top_k": -2}, "top_k", "got -2"),
        ({"top_k": 1.5}, "top_k", "a valid integer, got 1.5"),
        ({"min_p": 1.5}, "min_p", "got 1.5"),
        ({"min_tokens": 17}, "min_tokens", "min_tokens 17 is more than the 16 tokens"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids", "token id 100000"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "got -1"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids", "at most 128"),
        ({"max_tokens": 10**4300 - 1}, "max_tokens", "less than 9223372036854775808"),
        ({"best_of": 10**4299}, "best_of", "less than 9223372036854775808"),
        ({"prompt": [10**4299]}, "prompt", "is not within"),
        ({"user": 5}, "user", "a valid string, got 5"),
        ({"temprature": 0}, "temprature", "is unknown"),
    ],
)
def test_wrong_fields(server: Any, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(server.post(PATH, **({"prompt": "a"} | fields)), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert server.engine.submitted == []


def test_missing_prompt(server: Any) -> None:
    error = error_of(server.post(PATH, model=MODEL), 400)
    assert error["message"] == "prompt is missing; the request needs it"


@pytest.mark.parametrize(
    "content", ['{"prompt": "\\ud800"}', '{"prompt": "a", "\\ud800": 1}', '{"prompt": "a", "top_p": NaN}']
)
def test_what_json_or_utf8_cannot_carry(server: Any, content: str) -> None:
    error_of(server.http.post(PATH, content=content, headers=JSON), 400)


def test_context_is_used_to_the_last_token(server: Any) -> None:
    assert server.post(PATH, prompt=[5] * 60, max_tokens=4).status_code == 200
    # The default does not ask for more than there is.
    assert server.post(PATH, prompt=[5] * 60).status_code == 200
    assert [sampling.max_tokens for _, sampling in server.engine.submitted] == [4, 4]


def test_neutral_values_are_accepted(server: Any) -> None:
    neutral: dict[str, Any] = {
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0,
    }
    assert server.post(PATH, prompt="a", user="u", model=None, stop=None, **neutral).status_code == 200


def test_half_a_surrogate_in_a_message(server: Any) -> None:
    content = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    error = error_of(server.http.post("/v1/chat/completions", content=content, headers=JSON), 400)
    assert error["param"] == "messages.0.content"


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_unknown_model(server: Any, path: str) -> None:
    body = {"model": "other", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}
    body.pop("messages" if path == PATH else "prompt")
    error = error_of(server.post(path, **body), 404)
    assert error["code"] == "model_not_found"
    assert "'other'" in error["message"]
    assert MODEL in error["message"]


def test_routes_and_methods(server: Any) -> None:
    assert "GET /nothing" in error_of(server.http.get("/nothing"), 404)["message"]
    response = server.http.get(PATH)
    assert "GET /v1/completions" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


def test_body_limit(server: Any) -> None:
    assert server.http.post(PATH, content=json.dumps({"prompt": "a", "user": "x" * (4 << 20)})).status_code == 413
    fits = json.dumps({"prompt": [5], "user": "x" * ((4 << 20) - 100)})
    assert server.http.post(PATH, content=fits, headers=JSON).status_code == 200


def test_body_limit_without_a_declared_length(server: Any) -> None:
    chunks = (b"x" * (1 << 20) for _ in range(6))
    error = error_of(server.http.post(PATH, content=chunks, headers=JSON), 413)
    assert "4194304 bytes" in error["message"]


def test_engine_down(server: Any) -> None:
    server.engine.failure = "rank 1 ended with code -9"
    for stream in (False, True):
        error = error_of(server.post(PATH, prompt="a", stream=stream), 503)
        assert error["message"] == "the engine is down: rank 1 ended with code -9"
    error = error_of(server.http.get("/health"), 503)
    assert error["message"] == "rank 1 ended with code -9"


def test_engine_down_between_the_choices(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = server.engine.submit

    def failing(*arguments: Any) -> int:
        request_id: int = submit(*arguments)
        server.engine.failure = "rank 0 died"
        return request_id

    monkeypatch.setattr(server.engine, "submit", failing)
    error_of(server.post(PATH, prompt=["a", "b"]), 503)
    assert server.engine.cancelled == [0]


def test_unexpected_error(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> int:
        raise KeyError("secret")

    monkeypatch.setattr(server.engine, "submit", broken)
    error = error_of(server.post(PATH, prompt="a"), 500)
    assert error["message"] == "internal error (KeyError); see the server's log"


def test_health_and_models(server: Any) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    server.engine.ready = False
    assert "not ready" in error_of(server.http.get("/health"), 503)["message"]
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.client.models.retrieve(MODEL).created == 1_700_000_000
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other/model")
    assert server.http.get("/openapi.json").status_code == 200
