"""``python -m profiler import``, and ``info`` on what it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from profiler.__main__ import main
from profiler.fingerprint import model_fingerprint
from profiler.trace_format import RoutingCounts, RoutingTrace
from tests.support.engine_recordings import (
    in_all_layers,
    random_routes,
    sglang_text,
    write_lines,
    write_stat,
    write_statistics,
)
from tests.support.tiny_models import tiny_model
from tests.support.traces import random_sequences, write_trace

EXPLICIT = ["--model", "m", "--num-experts", "8", "--top-k", "2", "--layers", "1-2"]


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    """Two responses of a model with the shape of the tiny DeepSeek-V3: layers 1 and 2 of 3 are MoE, top-2 of 8."""
    lines = []
    for seed, domain in enumerate(["code", "law"]):
        rows = in_all_layers(random_routes(9, 2, 8, 2, seed), (1, 2), 3, 0)
        meta = {"prompt_tokens": 6, "completion_tokens": 4, "routed_experts": sglang_text(rows)}
        lines.append({"meta_info": meta, "domain": domain})
    return write_lines(tmp_path / "responses.jsonl", lines)


def test_responses_become_a_trace(responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t.safetensors"
    assert main(["import", "--from", "sglang", str(responses), "-o", str(output), *EXPLICIT]) == 0
    assert "18 (12 prefill, 6 decode)" in capsys.readouterr().out
    with RoutingTrace.open(output) as trace:
        assert (trace.model, trace.layer_ids, trace.top_k, trace.num_experts) == ("m", (1, 2), 2, 8)
        assert trace.domains == ("code", "law")
        assert trace.metadata["source"] == "sglang: responses.jsonl"
        np.testing.assert_array_equal(trace.experts(0, 9), random_routes(9, 2, 8, 2, 0))
        np.testing.assert_array_equal(trace.position(9), np.arange(9))
        np.testing.assert_array_equal(trace.decode(0, 9), np.arange(9) >= 6)


def test_a_model_or_a_trace_or_counts_tell_the_shape(responses: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("deepseek_v3").config.save_pretrained(folder)
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    command = ["import", "--from", "sglang", str(responses)]
    assert main([*command, "--like", str(folder), "-o", str(first)]) == 0
    assert main([*command, "--like", str(first), "-o", str(second)]) == 0
    RoutingCounts(np.ones((2, 8), int), "counted", (1, 2)).save(tmp_path / "counts.safetensors")
    assert main([*command, "--like", str(tmp_path / "counts.safetensors"), "--top-k", "2", "-o", str(third)]) == 0
    for path in (first, second):
        with RoutingTrace.open(path) as trace:
            assert (trace.model, trace.layer_ids) == (str(folder), (1, 2))
            assert trace.model_fingerprint == model_fingerprint(str(folder))
    with RoutingTrace.open(first) as a, RoutingTrace.open(third) as c:
        np.testing.assert_array_equal(a.experts(), c.experts())


def test_counts_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.zeros((2, 3, 8), int)
    counts[:, 1:] = np.arange(8)
    output = tmp_path / "c.safetensors"
    dump = write_stat(tmp_path / "dump.pt", counts)
    assert main(["import", "--from", "sglang", str(dump), "--model", "m", "-o", str(output)]) == 0
    imported = capsys.readouterr().out
    assert "112 (56 to 56 per layer)" in imported
    assert "stat sums over all ranks" in imported
    read = RoutingCounts.open(output)
    assert (read.model, read.layer_ids) == ("m", (1, 2))
    np.testing.assert_array_equal(read.counts, counts.sum(axis=0)[1:])
    assert main(["info", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "2: 1-2" in shown
    assert "2.00 (mean over layers)" in shown


def test_directories_and_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_statistics(tmp_path / "s", [{"1_0": np.ones(8)}], 8, 2)
    output = tmp_path / "o.safetensors"
    assert main(["import", "--from", "trtllm", str(folder), "--model", "m", "-o", str(output)]) == 0
    np.save(tmp_path / "e.npy", random_routes(10, 3, 8, 1)[:, :, 0])
    shape = ["--model", "m", "--num-experts", "8", "--layers", "0,2,4"]
    command = ["import", "--from", "exflow", str(tmp_path / "e.npy"), *shape, "-o", str(output)]
    assert main([*command, "--tokens-per-sequence", "5"]) == 0
    assert "all tokens count as prefill" in capsys.readouterr().out
    with RoutingTrace.open(output) as trace:
        assert (trace.num_sequences, trace.layer_ids) == (2, (0, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model was recorded?"),
        (["--model", "m", "--num-experts", "0"], "--num-experts 0: expected 1 to 65536"),
        (["--model", "m", "--layers", "3-1"], "--layers 3-1: expected rising"),
        (["--model", "m", "--layers", "1,1"], "--layers 1,1: expected rising"),
        (["--model", "m", "--layers", "a"], "--layers a: expected rising"),
        (["--model", "m"], "responses hold no shapes"),
        (["--like", "like.safetensors", "--num-experts", "9"], "--num-experts is 9, like.safetensors says 8"),
        (["--like", "like.safetensors", "--layers", "1-2"], "--layers is (1, 2), like.safetensors says (0, 1, 2)"),
        (["--like", "like.safetensors"], "expected 0 to 7|twice for one token"),
        (["--like", "missing.safetensors"], "cannot be read"),
        (["--like", "./nowhere"], "no such model folder"),
        (["responses.jsonl", *EXPLICIT], "named twice"),
        ([*EXPLICIT, "--tokens-per-sequence", "4"], "is for --from exflow"),
        ([*EXPLICIT, "seed=1"], "takes no settings"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    responses: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "like.safetensors", random_sequences([4]))
    before = sorted(tmp_path.iterdir())
    assert main(["import", "--from", "sglang", responses.name, *arguments, "-o", "out.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(part in error for part in message.split("|"))
    assert sorted(tmp_path.iterdir()) == before


def test_an_error_in_a_late_line_leaves_the_old_output(
    responses: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "t.safetensors"
    output.write_bytes(b"old")
    with responses.open("a") as file:
        file.write("{")
    assert main(["import", "--from", "sglang", str(responses), "-o", str(output), *EXPLICIT]) == 2
    assert "line 3: not JSON" in capsys.readouterr().err
    assert output.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["responses.jsonl", "t.safetensors"]
