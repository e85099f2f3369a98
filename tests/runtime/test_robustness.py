"""A real server over real HTTP, treated badly: fuzzed, cut off, left alone, stopped under load, robbed of a rank.

One server takes all that a server has to survive; what ends a server comes last or has a server of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import checks

from tests.support.malformed_requests import RAW, malformed_requests
from tests.support.plans import make_plan
from tests.support.serve_process import ServeProcess
from tests.support.streams import Stream
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

PLACES = 4  # sequences decoded together
EXIT_S = 30
LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 250, "stream": True, "ignore_eos": True}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    for gpus in (1, 2):
        make_plan(str(folder / "model"), "contiguous", gpus).save(folder / f"plan{gpus}.json")
    return folder


@contextlib.contextmanager
def serving(folder: Path, gpus: int, *settings: str) -> Iterator[ServeProcess]:
    arguments = ("device=cpu", "port=0", f"max_sequences={PLACES}", *settings)
    server = ServeProcess(folder / f"log{gpus}", "serve", "--plan", str(folder / f"plan{gpus}.json"), *arguments)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServeProcess]:
    with serving(folder, 1, "drain_timeout_s=2", "log_format=json", "max_waiting=40") as server:
        server.wait_ready()
        yield server


@pytest.fixture
def http(server: ServeProcess) -> Iterator[httpx.Client]:
    """A client; in the end the server must have nothing left to do, and still answer."""
    with httpx.Client(base_url=server.wait_ready(), timeout=30) as client:
        yield client
        wait_for(client, num_requests_running=0, num_requests_waiting=0)
        answer = client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 2})
        assert answer.status_code == 200, answer.text


def metrics(client: httpx.Client) -> dict[str, float]:
    """Values by name, without labels summed up."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            name = sample.name.removeprefix("expertplan_")
            values[name] = values.get(name, 0) + sample.value
    return values


def wait_for(client: httpx.Client, **expected: float) -> None:
    deadline = time.monotonic() + 20
    while {name: metrics(client)[name] for name in expected} != expected:
        assert time.monotonic() < deadline, metrics(client)
        time.sleep(0.02)


def port_of(url: str) -> tuple[str, int]:
    parsed = httpx.URL(url)
    assert parsed.port is not None
    return parsed.host, parsed.port


# --- requests that are wrong -----------------------------------------------------------------------------------------

BODIES = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_answers_are_as_the_openapi_document_says(http: httpx.Client) -> None:
    checks.load_all_checks()
    schema = schemathesis.openapi.from_url(f"{http.base_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"POST /v1/completions", "POST /tokenize", "GET /v1/placement/load"} <= {each.label for each in operations}
    for operation in operations:
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.body:
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:

            @BODIES
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                if isinstance(case.body, dict):
                    ask_for_little(case.body)
                # What is valid also depends on the model: its vocabulary, its context and its chat template.
                case.call_and_validate(excluded_checks=[checks.positive_data_acceptance])

            check()


def ask_for_little(body: dict[str, Any]) -> None:
    """More would only take time."""
    for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 2)):
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 3


def test_a_thousand_malformed_requests(http: httpx.Client) -> None:
    answered: dict[int, int] = {}
    for request in malformed_requests(seed=0, count=1000):
        response = http.request(request.method, request.path, content=request.content, headers=request.headers)
        status = response.status_code
        answered[status] = answered.get(status, 0) + 1
        assert status < 500, f"{request}: {response.text}"
        if status >= 400 and request.method != "HEAD":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, request
    assert answered[400] > 500
    assert answered[200] > 20
    assert {404, 405} < answered.keys()


def test_bytes_that_are_not_http(http: httpx.Client) -> None:
    for raw in RAW:
        connection = socket.create_connection(port_of(str(http.base_url)), timeout=20)
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
            assert not answer or answer.split()[1][:1] in (b"2", b"4"), (raw[:80], answer)
        assert http.get("/health").status_code == 200


def test_a_body_that_is_cut_off(http: httpx.Client) -> None:
    before = metrics(http)["prompt_tokens_total"]
    for length in (b"Content-Length: 1000", b"Transfer-Encoding: chunked"):
        for start in (b"", b'40\r\n{"prompt": "x", "max_'):
            with socket.create_connection(port_of(str(http.base_url)), timeout=20) as connection:
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                connection.sendall(head + length + b"\r\n\r\n" + start)
    assert http.get("/health").status_code == 200
    assert metrics(http)["prompt_tokens_total"] == before


def test_more_than_may_wait(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "n": 64, "max_tokens": 250, "ignore_eos": True})
    assert answer.status_code == 429, answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.json()["error"]["code"] == "queue_full"
    assert len(answer.headers["x-request-id"]) == 32


# --- clients that go away --------------------------------------------------------------------------------------------


def test_a_client_that_goes_away_frees_its_places(http: httpx.Client) -> None:
    before, ended_before = metrics(http), ended(http)
    with http.stream("POST", "/v1/completions", json=LONG | {"n": 36}):  # most of them wait
        deadline = time.monotonic() + 20
        while not metrics(http)["num_requests_waiting"]:
            assert time.monotonic() < deadline
    wait_for(http, num_requests_running=0, num_requests_waiting=0)
    assert metrics(http)["generation_tokens_total"] - before["generation_tokens_total"] < 36 * LONG["max_tokens"]
    since = {reason: count - ended_before[reason] for reason, count in ended(http).items()}
    assert since["cancelled"] > 0
    assert since == {"cancelled": 36 - since["length"], "length": since["length"], "stop": 0, "error": 0}


def ended(client: httpx.Client) -> dict[str, float]:
    """Requests by why they ended."""
    return {
        sample.labels["finished_reason"]: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "expertplan_request_success_total"
    }


def test_requests_that_come_at_random(http: httpx.Client) -> None:
    """Poisson arrivals, as serving benchmarks send them: mean gap 20 ms, lengths from 1 to 40."""
    rng = random.Random(0)
    arrivals, at_s = [], 0.0
    for _ in range(40):
        at_s += rng.expovariate(50)
        arrivals.append((at_s, rng.randint(1, 40), rng.randint(1, 40)))
    start_s = time.monotonic()

    def ask(arrival: tuple[float, int, int]) -> tuple[int, int]:
        at_s, prompt, wanted = arrival
        time.sleep(max(0.0, start_s + at_s - time.monotonic()))
        body = {"prompt": "a" * prompt, "max_tokens": wanted, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"], answer.json()["usage"]["completion_tokens"]

    with ThreadPoolExecutor(len(arrivals)) as pool:
        assert list(pool.map(ask, arrivals)) == [(prompt, wanted) for _, prompt, wanted in arrivals]
    check_load(http)


def check_load(http: httpx.Client) -> None:
    """What the page shows, right after a burst: every layer has computed the same number of pairs."""
    load, plan = http.get("/v1/placement/load").json(), http.get("/v1/placement").json()
    assert [[len(slots) for slots in gpus] for gpus in load["tokens"]] == [[8]] * len(plan["layer_ids"])
    pairs = {sum(map(sum, gpus)) for gpus in load["tokens"]}
    assert len(pairs) == 1
    assert pairs.pop() > 0
    assert load["balancedness"] == [1.0] * len(plan["layer_ids"])
    assert all(plan["top_k"] <= active <= plan["num_experts"] for [active] in load["active"])
    assert load["tokens_per_s"] > 0
    assert 0 < load["step_ms"]["median"] <= load["step_ms"]["p95"]


# --- ends ------------------------------------------------------------------------------------------------------------


def end_under_load(server: ServeProcess, act: Callable[[], None], first: dict[str, Any] = LONG) -> list[str]:
    """Open more streams than there are places, do something to the server, and see how the streams end."""
    url = server.wait_ready()
    streams = [Stream(url, first)]
    assert streams[0].flowing.wait(20)  # it has a place
    streams += [Stream(url, LONG | {"n": 3}) for _ in range(3 * PLACES - 1)]  # more than any drain can wait for
    assert all(stream.begun.wait(20) for stream in streams)
    act()
    start_s = time.monotonic()
    ends = [stream.end() for stream in streams]
    server.process.wait(EXIT_S)
    server.wait_gone(1)
    assert time.monotonic() - start_s < EXIT_S
    with socket.socket() as again:  # the port is free
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(port_of(url))
        again.listen()
    assert "Traceback" not in server.log
    return ends


def test_a_killed_rank_is_told_to_every_request(folder: Path) -> None:
    with serving(folder, 2) as server:
        server.wait_ready()
        ends = end_under_load(server, lambda: os.kill(server.pid_of(1), signal.SIGKILL))
        assert all("rank 1 was killed by SIGKILL" in end for end in ends), ends
        assert server.process.returncode == 1


def test_sigterm_under_load(server: ServeProcess) -> None:
    """The last test of the shared server."""
    short = LONG | {"max_tokens": 30}
    ends = end_under_load(server, lambda: server.process.send_signal(signal.SIGTERM), short)
    assert ends[0] == "complete"
    assert set(ends[1:]) <= {"complete", "the generation failed: the server is stopping"}
    assert ends[-1] != "complete"
    assert server.process.returncode == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert sum(line.get("status") == 200 and line.get("path") == "/v1/completions" for line in lines) > 40
    assert not [line for line in lines if line["level"] == "error"]
