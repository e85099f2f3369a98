"""What every request passes: the API key, CORS, request ids and logs, the queue's and the body's limits; health."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message

from profiler.errors import InputError
from runtime.requests import QueueFull
from runtime.server.body_limit import BodyLimit
from runtime.server.request_log import JsonFormatter, RequestIdFilter, TextFormatter
from runtime.server_settings import API_KEY_VARIABLE, ServerSettings

PATH = "/v1/completions"
KEY = "sk-test-5a1f"
ORIGIN = "https://page.example"
CONFIG: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "api_key": None, "cors_origins": []}


@pytest.fixture(scope="session")
def guarded(serve: Callable[..., Any], tokenizer: Any) -> Any:
    return serve(tokenizer, api_key=KEY, cors_origins=[ORIGIN])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- API key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({}, "no API key"),
        (bearer("wrong"), "wrong API key"),
        (bearer(KEY + "x"), "wrong API key"),
        (bearer(KEY[:-1]), "wrong API key"),
        ({"Authorization": "Bearer"}, "no API key"),
        ({"Authorization": f"Basic {KEY}"}, "wrong API key"),
        ({"Authorization": KEY}, "no API key"),
        ({"Authorization": b"Bearer \xff\xfe"}, "wrong API key"),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/tokenize", "/v1/models", "/v1/no/such"])
def test_refused_without_the_key(guarded: Any, path: str, headers: dict[str, Any], words: str) -> None:
    response = guarded.http.post(path, headers=headers, json={})
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert KEY not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.engine.submitted == []


def test_served_with_the_key(guarded: Any) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    assert client.models.list().data
    guarded.script("hello")
    assert client.completions.create(model="team/demo", prompt="a", max_tokens=40).choices[0].text == "hello"
    guarded.engine.reset()
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        guarded.client.models.list()
    assert guarded.http.get("/v1/models", headers={"authorization": f"bearer  {KEY}"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/openapi.json"])
def test_open_to_everyone(guarded: Any, path: str) -> None:
    assert guarded.http.get(path).status_code == 200


def test_the_key_comes_from_the_setting_or_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert ServerSettings.from_config(CONFIG).api_key is None
    monkeypatch.setenv(API_KEY_VARIABLE, "from-environment")
    assert ServerSettings.from_config(CONFIG).api_key == "from-environment"
    settings = ServerSettings.from_config(CONFIG | {"api_key": KEY})
    assert settings.api_key == KEY
    assert KEY not in repr(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key": ""}, "not empty"),
        ({"api_key": "schlüssel-17"}, "ASCII"),
        ({"api_key": "line\nbreak-17"}, "printable"),
        ({"api_key": 17}, "text"),
        ({"cors_origins": "https://a"}, "expected a list"),
        ({"cors_origins": [5]}, "cors_origins has 5"),
        ({"drain_timeout_s": 26}, "0 to 25"),
        ({"drain_timeout_s": -1}, "0 to 25"),
        ({"drain_timeout_s": True}, "seconds"),
        ({"log_format": "xml"}, "text or json"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        ServerSettings.from_config(CONFIG | settings)
    assert "17" not in str(caught.value)


# --- CORS ------------------------------------------------------------------------------------------------------------


def preflight(server: Any, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    return server.http.options(PATH, headers=asked)  # type: ignore[no-any-return]


def test_pages_of_named_origins_may_ask(guarded: Any) -> None:
    allowed = preflight(guarded, ORIGIN)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    answer = guarded.http.get("/v1/models", headers=bearer(KEY) | {"Origin": ORIGIN})
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    # Also a refusal can be read by the page.
    assert guarded.http.get("/v1/models", headers={"Origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN


def test_pages_of_other_origins_may_not(guarded: Any, server: Any) -> None:
    assert "access-control-allow-origin" not in preflight(guarded, "https://other.example").headers
    assert preflight(server, ORIGIN).status_code == 405
    assert "access-control-allow-origin" not in server.http.get("/health", headers={"Origin": ORIGIN}).headers


# --- request ids and logs --------------------------------------------------------------------------------------------


def test_request_ids(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.http.get("/health", headers={"X-Request-Id": "abc-123"}).headers["x-request-id"] == "abc-123"
    made = [server.http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    for unsafe in ("", "two words", "x" * 129, 'quote"', "a\tb"):
        assert len(server.http.get("/health", headers={"X-Request-Id": unsafe}).headers["x-request-id"]) == 32
    named = {"X-Request-Id": "mine"}
    with server.http.stream("POST", PATH, json={"prompt": "a", "stream": True}, headers=named) as stream:
        assert stream.headers["x-request-id"] == "mine"
    for path, body in (("/nothing", {}), (PATH, {}), (PATH, {"prompt": "a", "user": "x" * (5 << 20)})):
        refused = server.http.post(path, json=body, headers=named)
        assert refused.status_code in (400, 404, 413)
        assert refused.headers["x-request-id"] == "mine"
    monkeypatch.setattr(server.engine, "submit", lambda *_: 1 / 0)
    failed = server.http.post(PATH, json={"prompt": "a"}, headers=named)
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "mine")


def test_a_line_per_request(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "runtime.server.request_log")
    caplog.handler.addFilter(RequestIdFilter())
    server.script("answer")
    server.http.get("/health")
    secret = {"prompt": "the secret", "max_tokens": 40}
    server.http.post(f"{PATH}?token=hidden", json=secret, headers={"X-Request-Id": "id-7"} | bearer(KEY))
    server.http.post("/a%0Aforged%20line")
    deadline = time.monotonic() + 10
    while len(caplog.records) < 2:  # a line is written after its answer has gone out
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, second = caplog.records
    assert first.message.startswith("POST /v1/completions 200 in ")
    assert second.message.startswith("POST /a\\nforged line 404 in ")
    entry = json.loads(JsonFormatter().format(first))
    assert entry | {"time": "", "seconds": 0, "message": ""} == {
        "time": "",
        "level": "info",
        "logger": "runtime.server.request_log",
        "message": "",
        "request_id": "id-7",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "seconds": 0,
    }
    assert TextFormatter("%(levelname)s %(message)s").format(first).endswith(" s [id-7]")
    assert not any(word in caplog.text for word in ("secret", "hidden", "answer", KEY))


def test_json_logs_are_one_line_even_with_a_traceback() -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "went %s", ("wrong\nway",), (KeyError, error, None))
    line = JsonFormatter().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "went wrong\nway"
    assert "KeyError" in entry["traceback"]
    assert "request_id" not in entry


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.2, "1"), (3.0, "3"), (3.1, "4")])
def test_queue_is_full(server: Any, monkeypatch: pytest.MonkeyPatch, retry_after_s: float, header: str) -> None:
    def full(*_: Any) -> int:
        raise QueueFull("512 requests wait; try again later", retry_after_s)

    monkeypatch.setattr(server.engine, "submit", full)
    for stream in (False, True):
        response = server.post(PATH, prompt="a", stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == header
        assert response.json()["error"] == {
            "message": "512 requests wait; try again later",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
    with pytest.raises(openai.RateLimitError):
        server.client.completions.create(model="team/demo", prompt="a")


def test_queue_is_full_between_the_choices(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = server.engine.submit

    def second_full(*arguments: Any) -> int:
        if server.engine.submitted:
            raise QueueFull("one request waits", 1)
        return submit(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(server.engine, "submit", second_full)
    assert server.post(PATH, prompt=["a", "b"]).status_code == 429
    assert server.engine.cancelled == [0]


def test_what_the_engine_refuses_is_the_requests_fault(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise InputError("token id 402: expected 0 to 399")

    monkeypatch.setattr(server.engine, "submit", refuse)
    response = server.post(PATH, prompt="a")
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "token id 402: expected 0 to 399"


def test_a_body_that_does_not_come() -> None:
    sent: list[Message] = []

    async def never() -> Message:
        await asyncio.sleep(60)
        raise AssertionError

    async def keep(message: Message) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("the application saw half a request")

    limit = BodyLimit(app, max_seconds=0.05)
    asyncio.run(limit({"type": "http", "method": "POST", "headers": []}, never, keep))
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"


# --- health, version, tokens -----------------------------------------------------------------------------------------


def test_health_while_stopping(serve: Callable[..., Any], tokenizer: Any) -> None:
    server = serve(tokenizer)
    server.post(PATH, prompt="a")  # by now the application is there
    assert server.http.get("/health").status_code == 200
    server.app.state.context.stopping = "the server is stopping"
    response = server.http.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the server is stopping"
    server.app.state.context.abort_generations("the server is stopping")
    late = server.post(PATH, prompt="a")
    assert late.status_code == 503
    assert len(server.engine.submitted) == 1


def test_version(server: Any) -> None:
    assert list(server.http.get("/version").json()) == ["version"]


def test_tokenize_and_back(server: Any) -> None:
    text = "Straße 专 <eos>"
    answer = server.post("/tokenize", prompt=text).json()
    assert answer["tokens"] == server.tokenizer(text)["input_ids"]
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 64
    assert answer["token_strs"] is None
    assert server.post("/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    named = server.post("/tokenize", prompt=text, return_token_strs=True, add_special_tokens=False, model="team/demo")
    assert named.json()["token_strs"] == server.tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert server.post("/tokenize", prompt="").json()["tokens"] == []
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}


def test_tokenize_a_conversation(server: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for beginning in (True, False):
        answer = server.post("/tokenize", messages=messages, add_generation_prompt=beginning).json()
        expected = server.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=beginning)
        assert server.tokenizer.decode(answer["tokens"]) == expected


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either prompt or messages"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "developer", "content": "a"}]}, "template refuses"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": [1, -1]}, "token id -1"),
        ("/detokenize", {"tokens": [10**9]}, "token id 1000000000"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0"),
    ],
)
def test_tokenization_refusals(server: Any, path: str, body: dict[str, Any], words: str) -> None:
    response = server.post(path, **body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert server.post(path, **body | {"prompt": "a", "tokens": [1], "model": "other"}).status_code in (400, 404)
