"""The benchmark of recording runs the same batch in every way, and its rows say what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "benchmarks" / "shapes" / "qwen3-30b-a3b" / "config.json"
SMALL = {
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_rows_of_a_small_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(SHAPE.read_text()) | SMALL))
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.recording_cost", "-o", str(output), "--shape", str(tmp_path)]
    command += ["--device", "cpu", "--dtype", "float32", "--batch", "2", "--prompt-tokens", "5", "--new-tokens", "4"]
    command += ["--repeats", "2", "--commit", "abc"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    assert "routes+gate_ahead" in answer.stdout
    document = json.loads(output.read_text())
    assert document["commit"] == "abc"
    assert {"command", "device", "versions"} <= document.keys()
    ways = [(row["experts"], row["recording"]) for row in document["rows"]]
    recordings = ("none", "routes", "routes+gate_ahead")
    assert ways == [(experts, recording) for experts in ("default", "grouped_mm") for recording in recordings]
    for row in document["rows"]:
        assert row["same_tokens_fraction"] == 1.0  # recording changes nothing
        assert 0 < row["min_s_per_generate"] <= row["s_per_generate"] <= row["max_s_per_generate"]
        assert row["min_slowdown_fraction"] <= row["slowdown_fraction"] <= row["max_slowdown_fraction"]
        assert row["ms_per_step"] == pytest.approx(row["s_per_generate"] * 1000 / 4)
        assert (row["context"], row["batch"], row["repeats"]) == ("5-9", 2, 2)
    assert all(row["slowdown_fraction"] == 0 for row in document["rows"] if row["recording"] == "none")
