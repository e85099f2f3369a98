"""The agreement that the benchmark reports is a real comparison: it is zero where it should be, and only there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ROOT / "benchmarks" / "shapes" / "qwen3-30b-a3b" / "config.json"
SMALL = {
    "hidden_size": 64,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run_ranks(ranks: int, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Rows of one run, agreement rows by exchange."""
    output = folder / f"{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.expert_parallel_decode", "--shape", str(folder), "--reference", str(folder)]
    command += ["-o", str(output), "--batches", "2", "--steps", "2", "--plans", "copies", "--device", "cpu"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert any(row["kind"] == "decode" and row["ms_per_step"] > 0 for row in rows)
    return {name: [row for row in rows if row["exchange"] == name] for name in ("allreduce", "alltoall")}


def test_agreement_notices_other_logits_and_routes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads(SHAPE.read_text()) | SMALL))
    run_ranks(1, tmp_path)
    record = tmp_path / "reference.safetensors"
    reference = load_file(record)
    # Falsify what `alltoall` on two ranks is compared with, by 10 per cent and by other routes; keep `allreduce`'s.
    for name, tensor in reference.items():
        if name.startswith("logits.2."):
            reference[name] = tensor * 1.1
        elif name.startswith("ids.2."):
            reference[name] = (tensor + 1) % SMALL["num_experts"]
    save_file(reference, record)
    rows = run_ranks(2, tmp_path)
    forced, free = (row for row in rows["allreduce"] if row["kind"] == "agreement")
    assert forced["largest_relative_logit_error"] < 1e-3
    assert free["differing_routes_fraction"] == 0
    forced, free = (row for row in rows["alltoall"] if row["kind"] == "agreement")
    assert forced["largest_relative_logit_error"] > 0.1, "other routes were forced"
    assert free["largest_relative_logit_error"] == pytest.approx(0.1 / 1.1, rel=1e-2)
    assert free["differing_routes_fraction"] > 0.5
