"""`bench serve`: figures of known answers, arrivals, a server with known delays, and every kind of failure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.__main__ import main
from runtime.bench_serve_figures import measure
from runtime.bench_serve_load import Answer, arrival_times
from tests.support.scripted_server import FIRST_S, NEXT_S, ScriptedServer

TOLERANCE_MS = 40.0  # of a busy machine; the delays themselves are exact lower bounds


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


def bench(url: str, *flags: str, output: Path | None = None) -> int:
    saved = ["-o", str(output)] if output else []
    return main(["bench", "serve", "--url", url, *flags, *saved])


def rows_of(path: Path) -> dict[str, Any]:
    [row] = json.loads(path.read_text())["rows"]
    return dict(row)


def answer(sent_s: float, text_s: list[float], end_s: float, tokens: int) -> Answer:
    return Answer(0.001, sent_s, text_s, end_s, prompt_tokens=10, output_tokens=tokens)


def test_figures_of_known_answers() -> None:
    answers = [
        answer(100.0, [100.1, 100.2, 100.4], 100.5, 3),
        answer(100.5, [100.9, 101.0, 101.1], 101.1, 5),  # five tokens in three pieces
        answer(101.0, [101.2], 102.0, 1),
        Answer(sent_s=100.0, end_s=100.1, error="HTTP 500: broken"),
    ]
    row = measure(answers, {"ttft": 250.0, "tpot": 100.0})
    expected = {
        "requests": 4,
        "failed_requests": 1,
        "seconds": 2.0,
        "prompt_tokens": 30,
        "output_tokens": 9,
        "requests_per_s": 1.5,
        "output_tokens_per_s": 4.5,
        "total_tokens_per_s": 19.5,
        "good_requests": 1,  # the first has 150 ms per token, the second 400 ms to its first; the third has no TPOT
        "goodput_requests_per_s": 0.5,
        "median_ttft_ms": 200.0,
        "mean_ttft_ms": 700 / 3,
        "mean_tpot_ms": 100.0,
        "median_itl_ms": 100.0,
        "p95_itl_ms": np.percentile([100, 200, 100, 100], 95),
        "mean_e2e_ms": (500 + 600 + 1000) / 3,
        "p99_e2e_ms": np.percentile([500, 600, 1000], 99),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert "median_tpot_ms" not in measure([answer(0, [1], 2, 1)], {})


@given(rate=st.floats(0.1, 1000), number=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_arrivals_rise_from_0_and_repeat(rate: float, number: int, seed: int) -> None:
    times = arrival_times(rate, number, seed)
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    np.testing.assert_array_equal(times, arrival_times(rate, number, seed))


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff(arrival_times(20, 20_001, 0))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.03)
    assert not arrival_times(math.inf, 5, 0).any()


def test_latencies_of_a_scripted_server(server: ScriptedServer, tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    flags = ("--request-rate", "40", "--num-prompts", "12", "--output-len", "6", "--input-len", "9", "--seed", "3")
    described = ("--engine", "scripted 1", "--device", "none", "--goodput", "ttft:10000,tpot:1")
    assert bench(server.url, *flags, *described, output=output) == 0
    row = rows_of(output)
    assert (row["requests"], row["failed_requests"], row["errors"]) == (12, 0, "")
    assert (row["output_tokens"], row["prompt_tokens"]) == (12 * 6, 12 * 7)
    assert (row["engine"], row["device"], row["model"]) == ("scripted 1", "none", "scripted")
    e2e_s = FIRST_S + 5 * NEXT_S
    for name, delay_s in (("ttft", FIRST_S), ("tpot", NEXT_S), ("itl", NEXT_S), ("e2e", e2e_s)):
        assert 0 <= row[f"median_{name}_ms"] - delay_s * 1e3 + 2 <= TOLERANCE_MS, name
    measured = server.served[1:]  # the first is the warm-up
    sent = np.array([served.received_s for served in measured]) - measured[0].received_s
    np.testing.assert_allclose(np.sort(sent), arrival_times(40, 12, 3), atol=TOLERANCE_MS / 1e3)
    seconds = max(served.sent_s[-1] for served in measured) - measured[0].received_s
    assert row["output_tokens_per_s"] == pytest.approx(72 / seconds, rel=0.15)
    assert row["good_requests"] == 0  # no token takes less than a millisecond
    body = measured[0].body
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (6, True, True)
    assert all(len(served.body["prompt"]) == 9 for served in measured)
    assert len({str(served.body["prompt"]) for served in measured}) == 12


def test_concurrency_is_bounded_and_the_wait_is_not_counted(server: ScriptedServer, tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    flags = ("--num-prompts", "8", "--concurrency", "2", "--output-len", "3", "--warmup", "0")
    assert bench(server.url, *flags, output=output) == 0
    assert server.most_open == 2
    assert rows_of(output)["median_ttft_ms"] < FIRST_S * 1e3 + TOLERANCE_MS


def test_tokens_are_the_servers_count(tmp_path: Path) -> None:
    output = tmp_path / "serve.json"
    with ScriptedServer(usage_factor=4) as server:
        assert bench(server.url, "--num-prompts", "2", "--output-len", "5", "--warmup", "0", output=output) == 0
    row = rows_of(output)
    assert row["output_tokens"] == 2 * 20
    assert row["mean_tpot_ms"] == pytest.approx(row["mean_itl_ms"] * 4 / 19, rel=0.01)


def test_failures_are_counted_and_shown(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "serve.json"
    prompts.write_text("refuse\nfail\ncut\nmute\ngarbage\nfine\n")
    flags = ("--prompts", str(prompts), "--num-prompts", "7", "--output-len", "3", "--warmup", "0")
    assert bench(server.url, *flags, output=output) == 0
    shown = capsys.readouterr()
    assert "2 x HTTP 429: the queue is full" in shown.err  # the file is sent over and over
    for error in ("in the stream: a rank is gone", "the answer has no text", "not an event of this interface"):
        assert f"1 x {error}" in shown.err
    assert "7 requests in" in shown.out
    row = rows_of(output)
    assert (row["requests"], row["failed_requests"], row["output_tokens"]) == (7, 6, 3)
    assert row["errors"].count(" x ") == 5
    assert bench(server.url, "--prompts", str(prompts), "--num-prompts", "1", "--warmup", "0") == 1
    assert "none of 1 requests was answered" in capsys.readouterr().err


def test_chat_and_key(server: ScriptedServer, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "serve.json"
    prompts.write_text('{"prompt": "Who routes?"}\n')
    flags = ("--prompts", str(prompts), "--endpoint", "chat", "--num-prompts", "1", "--api-key", "se'cret")
    assert bench(server.url, *flags, output=output) == 0
    assert server.served[-1].body["messages"] == [{"role": "user", "content": "Who routes?"}]
    assert server.served[-1].headers["authorization"] == "Bearer se'cret"
    assert "cret" not in output.read_text()


@pytest.mark.parametrize(("flags", "message"), [
    (["--request-rate", "0"], "--request-rate 0: expected requests per second above 0, or inf"),
    (["--request-rate", "fast"], "--request-rate fast"),
    (["--num-prompts", "0"], "--num-prompts 0: expected at least 1"),
    (["--concurrency", "0"], "--concurrency 0"),
    (["--goodput", "itl:5"], "--goodput itl:5: expected ttft, tpot, e2e"),
    (["--goodput", "ttft:-1"], "--goodput ttft:-1"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--endpoint", "chat"], "give --prompts FILE"),
    (["--prompts", "/nowhere/prompts.txt"], "/nowhere/prompts.txt: cannot be read"),
    (["-o", "/nowhere/out.json"], "/nowhere does not exist"),
    (["port=1"], "port=1: bench serve takes no settings"),
    (["--url", "127.0.0.1:8000"], "expected http://HOST:PORT"),
    (["--url", "http://h:99999"], "expected http://HOST:PORT"),
    (["--url", "http://u:p@h"], "without a user"),
    ([], "http://127.0.0.1:9: no answer"),
])  # fmt: skip
def test_bad_input(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_server_that_refuses_the_first_request(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("refuse\n")
    assert bench(server.url, "--prompts", str(prompts)) == 2
    assert "the first request failed: HTTP 429: the queue is full" in capsys.readouterr().err
