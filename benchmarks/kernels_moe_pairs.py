"""The experts' products of few pairs: every pair by itself against tiles, for four published models.

    python -m benchmarks.kernels_moe_pairs -o benchmarks/results/kernels_moe_pairs.json

What `kernels/grouped_gemm/tiles.py` takes lines for comes from here. Results are compared with the reference; times are
taken in CUDA graphs over several layers' weights, with uniform seeded routes.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.graph_timing import read_bytes_per_us, time_us
from benchmarks.kernels_moe import LAYERS, SHAPES, STEPS, Experts, Step, floor_us
from benchmarks.kernels_moe_tune import call
from kernels.grouped_gemm import down_reference, gate_up_reference
from kernels.grouped_gemm.tiles import Lines, Tiles, choose_tiles
from placement import provenance

LINES = (Lines(4, 1024, 4), Lines(8, 256, 4))


def error_of(found: torch.Tensor, experts: Experts, step: Step, op: str) -> float:
    """Relative difference of the first layer's product from the reference."""
    if op == "gate_up":
        arguments = (step.permutation, experts.shape.top_k, experts.shape.activation, experts.first_bias)
        expected = gate_up_reference(step.x, experts.first[0], *arguments).float()
    else:
        expected = down_reference(step.hidden, experts.second[0], step.permutation, experts.second_bias).float()
    return float((found.float() - expected).norm() / expected.norm())


def measure(experts: Experts, tokens: int, op: str, rate: float) -> list[dict[str, Any]]:
    """One product of one batch, in every way."""
    shape = experts.shape
    steps = [Step.make(experts, tokens, seed) for seed in range(STEPS)]
    active = sum(step.active() for step in steps) / STEPS
    columns, depth = (shape.inner, shape.width) if op == "gate_up" else (shape.width, shape.inner)
    tiles = choose_tiles(tokens * shape.top_k, shape.experts, columns, depth, op == "gate_up", 2)
    rows = []
    ways: tuple[Tiles | Lines, ...] = (tiles, *LINES)
    for way in ways:
        took = time_us([functools.partial(call, experts, s, i % LAYERS, op, way) for i, s in enumerate(steps)])
        row = {"shape": shape.name, "batch": tokens, "op": op, "way": "tiles" if isinstance(way, Tiles) else "lines"}
        row |= {"sizes": list(way), "active_experts": active, "time_us": took}
        row["floor_us"] = floor_us(op, shape, tokens, active, (rate, float("inf")))
        row["relative_error"] = error_of(call(experts, steps[0], 0, op, way), experts, steps[0], op)
        rows.append(row)
    return rows


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES))
    parser.add_argument("--batches", default="1,2,4,8")
    flags = parser.parse_args()
    rate = read_bytes_per_us()
    described = provenance.describe_run(("torch", "triton")) | {"device": f"1x {torch.cuda.get_device_name()}"}
    described["read_tb_per_s"] = rate / 1e6
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        if shape.name not in flags.shapes.split(","):
            continue
        experts = Experts(shape)
        for tokens in map(int, flags.batches.split(",")):
            for op in ("gate_up", "down"):
                rows += measure(experts, tokens, op, rate)
                times = "  ".join(f"{row['sizes'][:3]} {row['time_us']:.1f}" for row in rows[-1 - len(LINES) :])
                error = max(row["relative_error"] for row in rows[-1 - len(LINES) :])
                print(shape.name, tokens, op, f"floor {rows[-1]['floor_us']:.1f}:", times, f"{error:.1e}", flush=True)
        del experts
        torch.cuda.empty_cache()
        Path(flags.output).write_text(json.dumps(described | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
