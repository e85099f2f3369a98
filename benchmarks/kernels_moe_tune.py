"""Try tiles for the experts' products: what `kernels/grouped_gemm/tiles.py` chooses comes from here.

python -m benchmarks.kernels_moe_tune -o tune.json
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from benchmarks.graph_timing import matmul_flops_per_us, read_bytes_per_us, time_us
from benchmarks.kernels_moe import LAYERS, SHAPES, STEPS, Experts, Shape, Step, floor_us
from kernels.grouped_gemm.kernel import down_triton, gate_up_triton
from kernels.grouped_gemm.tiles import Lines, Tiles
from placement import provenance

SHARED_BYTES = 227 * 1024
BATCHES = (1, 8, 32, 128, 256, 4096)
# rows → (columns of a gated product, depth, warps, stages); the other product has twice the columns
CANDIDATES = {
    16: [
        (16, 128, 4, 4), (16, 128, 4, 6), (16, 128, 2, 4), (16, 256, 4, 3), (16, 256, 4, 4), (32, 64, 4, 6),
        (32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5), (32, 128, 2, 4), (32, 256, 4, 3), (64, 64, 4, 4),
        (64, 128, 4, 3), (64, 128, 8, 4), (128, 128, 8, 2),
    ],
    32: [(32, 128, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 128, 8, 2)],
    64: [(32, 128, 4, 3), (64, 64, 4, 4), (64, 64, 4, 5), (128, 64, 8, 4), (64, 64, 8, 4)],
    128: [(64, 64, 4, 4), (64, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4)],
}  # fmt: skip
ROWS = {1: (16,), 8: (16,), 32: (16, 32), 128: (16, 32, 64), 256: (16, 32, 64, 128), 4096: (64, 128)}


def candidates(rows: int, gated: bool, tokens: int) -> list[Tiles]:
    """Tiles that fit into shared memory; for many rows also in groups of row tiles."""
    found = []
    for columns, depth, warps, stages in CANDIDATES[rows]:
        wide = 2 * columns  # rows of weights, either way
        if (rows + wide) * depth * 2 * stages <= SHARED_BYTES:
            for group in (8, 0) if tokens > 256 else (0,):
                for bulk in (False, True):
                    found.append(Tiles(rows, columns if gated else wide, depth, warps, stages, group, bulk))
    return found


def call(experts: Experts, step: Step, layer: int, op: str, tiles: Tiles | Lines) -> torch.Tensor:
    """One product with these tiles or lines."""
    if op == "gate_up":
        arguments = (step.permutation, experts.shape.top_k, experts.shape.activation, experts.first_bias, tiles)
        return gate_up_triton(step.x, experts.first[layer], *arguments)
    return down_triton(step.hidden, experts.second[layer], step.permutation, experts.second_bias, tiles=tiles)


def compile_some(work: tuple[Shape, str, list[Tiles]]) -> None:
    """Compile in a process of its own, for the cache that all processes share."""
    shape, op, choices = work
    with torch.no_grad():
        x = torch.zeros(1, shape.width, device="cuda", dtype=torch.bfloat16)
        order = torch.zeros(shape.top_k, device="cuda", dtype=torch.int32)
        indptr = torch.zeros(shape.experts + 1, device="cuda", dtype=torch.int32)
        hidden = torch.zeros(shape.top_k, shape.inner, device="cuda", dtype=torch.bfloat16)
        size = (2 * shape.inner, shape.width) if op == "gate_up" else (shape.width, shape.inner)
        weight = torch.empty(shape.experts, *size, device="cuda", dtype=torch.bfloat16)
        bias = weight[:, :, 0].contiguous() if shape.activation == "gpt_oss" else None
        from kernels.permute import Permutation

        for tiles in choices:
            if op == "gate_up":
                gate_up_triton(x, weight, Permutation(order, indptr), shape.top_k, shape.activation, bias, tiles)
            else:
                down_triton(hidden, weight, Permutation(order, indptr), bias, tiles=tiles)


def main() -> None:
    """Time every candidate and print the best three of each product."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES))
    flags = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name in flags.shapes.split(",")]
    batches = tuple(int(size) for size in flags.batches.split(","))
    every = {
        (t, op): [c for rows in ROWS[t] for c in candidates(rows, op == "gate_up", t)]
        for t in batches
        for op in ("gate_up", "down")
    }
    work = []
    for shape in shapes:
        for op in ("gate_up", "down"):
            unique = list({(*c[:5], c.bulk): c for t in batches for c in every[t, op]}.values())
            work += [(shape, op, unique[i::6]) for i in range(6)]
    with multiprocessing.get_context("spawn").Pool(flags.processes) as pool:
        pool.map(compile_some, work, chunksize=1)
    print("compiled", flush=True)
    rates = read_bytes_per_us(), matmul_flops_per_us()
    print(torch.cuda.get_device_name(), f"read {rates[0] / 1e6:.2f} TB/s, matmul {rates[1] / 1e6:.0f} TFLOP/s")
    described = provenance.describe_run(("torch", "triton")) | {"device": f"1x {torch.cuda.get_device_name()}"}
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        experts = Experts(shape)
        for tokens in batches:
            steps = [Step.make(experts, tokens, seed) for seed in range(STEPS)]
            active = sum(step.active() for step in steps) / STEPS
            for op in ("gate_up", "down"):
                floor, timed = floor_us(op, shape, tokens, active, rates), []
                for tiles in every[tokens, op]:
                    bound = [functools.partial(call, experts, s, i % LAYERS, op, tiles) for i, s in enumerate(steps)]
                    timed.append((time_us(bound), tiles))
                timed.sort(key=lambda pair: pair[0])
                rows += [
                    {"shape": shape.name, "batch": tokens, "op": op, "floor_us": floor, "time_us": t, "tiles": list(c)}
                    for t, c in timed
                ]
                best = "  ".join(f"{tuple(c)} {t:.1f}" for t, c in timed[:3])
                print(
                    shape.name,
                    tokens,
                    op,
                    f"floor {floor:.1f} ({floor / timed[0][0]:.0%}):",
                    best,
                    f" worst {timed[-1][0]:.1f}",
                    flush=True,
                )
        del experts
        torch.cuda.empty_cache()
        Path(flags.output).write_text(json.dumps(described | {"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
