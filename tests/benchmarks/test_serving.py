"""The serving benchmarks: a small shape from end to end, and what the soak test judges."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import judge_steps
from benchmarks.serving_soak import Stream, growth, judge, resident_bytes
from runtime.bench_serve_load import Answer
from runtime.requests import StepTime
from tests.benchmarks.test_expert_parallel_decode import ROOT, SHAPE, SMALL

CRITERIA = ("no_error", "fair", "memory_flat")


def test_a_small_shape_is_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(SHAPE.read_text()) | SMALL))
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.serving", "--shape", str(tmp_path), "-o", str(output)]
    command += ["--device", "cpu", "--batch", "3", "--num-prompts", "6", "--input-len", "16", "--output-len", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    bare, served = json.loads(output.read_text())["rows"]
    assert (bare["kind"], bare["batch"], bare["context"]) == ("bare decode", 3, "16-24")
    assert (served["requests"], served["failed_requests"], served["output_tokens"]) == (6, 0, 48)
    assert served["prompt_tokens"] == 6 * 16
    assert served["bare_ms_per_step"] == bare["ms_per_step"] > 0
    assert served["overhead"] == pytest.approx(served["server_ms_per_step"] / bare["ms_per_step"] - 1)
    assert served["server_steps"] >= 2


def test_steps_that_are_compared() -> None:
    steps = [StepTime(0.011, 4), StepTime(0.012, 4), StepTime(0.013, 4), StepTime(0.5, 4, 128), StepTime(0.001, 3)]
    row = judge_steps(steps, 10.0, 4)
    assert row["overhead"] == pytest.approx(0.2)
    assert (row["server_steps"], row["server_steps_with_prompts"]) == (3, 1)
    assert row["share_of_steps_at_batch"] == 0.8
    with pytest.raises(SystemExit, match="no step decoded 5"):
        judge_steps(steps, 10.0, 5)


def stream(tokens: int, error: str | None = None) -> Stream:
    answer = Answer(sent_s=1.0, text_s=[1.5, 2.0], end_s=2.0, output_tokens=tokens, error=error)
    return Stream([answer], seconds=2.0)


def test_what_the_soak_judges() -> None:
    flags = argparse.Namespace(ranks=2, exchange="allreduce", streams=3, seconds=9.0)
    flat = [{0: 100, 1: 200}] * 40
    row = judge([stream(10), stream(8), stream(5)], flat, flags)
    assert row["slowest_over_median"] == pytest.approx(5 / 8)
    assert [row[name] for name in CRITERIA] == [True] * 3
    leaking = [{0: 100, 1: 200 + second} for second in range(40)]
    row = judge([stream(10), stream(8), stream(3), stream(8, "HTTP 500")], leaking, flags)
    assert [row[name] for name in CRITERIA] == [False] * 3


def test_memory_may_grow_while_it_warms_up() -> None:
    assert growth([50, 90, *[100] * 8]) == 0
    assert growth([100] * 6 + [110] * 4) == pytest.approx(0.1)


def test_resident_memory_of_a_process_group() -> None:
    found = resident_bytes(os.getpgid(0))
    assert max(found.values()) > 10e6
