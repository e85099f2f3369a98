"""The MoE kernels of published models' shapes against the card's ceilings and against `grouped_mm`.

    python -m benchmarks.kernels_moe -o benchmarks/results/kernels_moe.json

Routes are uniform and seeded; every time is taken in a CUDA graph that goes through several layers' weights, so that
L2 cannot hold them. A floor is the larger of bytes over the memory rate (the faster of a copy and of a sum, which only
reads, as these kernels almost do) and operations over the matrix rate, all measured in the same run; bytes count each
active expert's weights, inputs and outputs once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.graph_timing import copy_bytes_per_us, matmul_flops_per_us, read_bytes_per_us, time_us
from kernels import launch
from kernels.combine import combine
from kernels.grouped_gemm import Activation, down, gate_up
from kernels.permute import Permutation, permute
from kernels.route import Routes, route
from kernels.route_permute import route_permute
from placement import provenance

LAYERS, STEPS = 4, 8  # layers' weights; calls in a graph, each with routes of its own
DECODE, PREFILL = (1, 4, 8, 16, 32, 64, 128, 256), (2048, 4096)
ITEM = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Shape:
    """Experts P (all on this GPU), choices K, model width D and expert width F of a model."""

    name: str
    experts: int
    top_k: int
    width: int
    inner: int
    activation: Activation = "silu"


SHAPES = (
    Shape("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Shape("Mixtral-8x7B", 8, 2, 4096, 14336),
    Shape("gpt-oss-20b", 32, 4, 2880, 2880, "gpt_oss"),
    Shape("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
)


def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
    """Random bfloat16 on the GPU."""
    return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=scale)


class Experts:
    """Random weights of a shape, biases where the family has them."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        self.shape = shape
        experts, width, inner = shape.experts, shape.width, shape.inner
        self.first = [draw(experts, 2 * inner, width, scale=width**-0.5) for _ in range(LAYERS)]
        self.second = [draw(experts, width, inner, scale=inner**-0.5) for _ in range(LAYERS)]
        biased = shape.activation == "gpt_oss"
        self.first_bias = draw(experts, 2 * inner) if biased else None
        self.second_bias = draw(experts, width) if biased else None


@dataclass(frozen=True)
class Step:
    """One step's inputs and what every kernel hands the next."""

    logits: torch.Tensor
    x: torch.Tensor
    routes: Routes
    permutation: Permutation
    hidden: torch.Tensor
    pairs: torch.Tensor

    @classmethod
    def make(cls, experts: Experts, tokens: int, seed: int) -> Step:
        """Inputs of one layer's call, with uniform routes."""
        torch.manual_seed(seed)
        shape, layer = experts.shape, seed % LAYERS
        logits, x = draw(tokens, shape.experts), draw(tokens, shape.width)
        routes, permutation = route_permute(logits, shape.experts, top_k=shape.top_k, renormalise=True)
        hidden = gate_up(x, experts.first[layer], permutation, shape.top_k, shape.activation, experts.first_bias)
        pairs = down(hidden, experts.second[layer], permutation, experts.second_bias)
        return cls(logits, x, routes, permutation, hidden, pairs)

    def active(self) -> int:
        """Experts with at least one token."""
        return int((self.permutation.indptr.diff() > 0).sum())


Call = Callable[[Step, int], object]


def kernel_calls(experts: Experts, norm: torch.Tensor) -> dict[str, Call]:
    """One call of every kernel, and the whole chain of a layer."""
    shape = experts.shape

    def products(step: Step, layer: int, permutation: Permutation) -> torch.Tensor:
        first, second = experts.first[layer], experts.second[layer]
        hidden = gate_up(step.x, first, permutation, shape.top_k, shape.activation, experts.first_bias)
        return down(hidden, second, permutation, experts.second_bias, after_gate_up=True)

    def chain(step: Step, layer: int) -> object:
        routes, permutation = route_permute(step.logits, shape.experts, top_k=shape.top_k, renormalise=True)
        return combine(products(step, layer, permutation), routes, None, step.x, norm, 1e-6)

    return {
        "route": lambda step, _: route(step.logits, top_k=shape.top_k, renormalise=True),
        "permute": lambda step, _: permute(step.routes.slots, shape.experts),
        "route_permute": lambda step, _: route_permute(step.logits, shape.experts, top_k=shape.top_k, renormalise=True),
        "gate_up": lambda step, layer: gate_up(
            step.x, experts.first[layer], step.permutation, shape.top_k, shape.activation, experts.first_bias
        ),
        "down": lambda step, layer: down(step.hidden, experts.second[layer], step.permutation, experts.second_bias),
        "combine": lambda step, _: combine(step.pairs, step.routes, None, step.x, norm, 1e-6),
        "layer": chain,
    }


def library_calls(experts: Experts) -> dict[str, Call]:
    """The products by torch's grouped matrix product; without biases, which it does not take."""
    shape = experts.shape
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    def first(step: Step, layer: int) -> object:
        gathered = step.x[step.permutation.order // shape.top_k]
        offsets = step.permutation.indptr[1:]
        gate, up = grouped_mm(gathered, experts.first[layer].transpose(1, 2), offs=offsets).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    def second(step: Step, layer: int) -> object:
        offsets = step.permutation.indptr[1:]
        return grouped_mm(step.hidden, experts.second[layer].transpose(1, 2), offs=offsets)

    return {"gate_up": first, "down": second}


def floor_us(op: str, shape: Shape, tokens: int, active: float, rates: tuple[float, float]) -> float:
    """The larger of the bytes' and the operations' time."""
    pairs, width, inner = tokens * shape.top_k, shape.width, shape.inner
    first = active * 2 * inner * width + tokens * width + pairs * inner
    second = active * inner * width + pairs * inner + pairs * width
    words = {"gate_up": first, "down": second, "combine": pairs * width + 3 * tokens * width}
    words["layer"] = active * 3 * inner * width + 3 * tokens * width + tokens * shape.experts
    operations = {"gate_up": 4 * pairs * inner * width, "down": 2 * pairs * inner * width}
    operations["layer"] = 6 * pairs * inner * width
    routing = (tokens * shape.experts * ITEM + 12 * pairs) / ITEM
    return max(ITEM * words.get(op, routing) / rates[0], operations.get(op, 0) / rates[1])


def measure(shape: Shape, batches: tuple[int, ...], rates: tuple[float, float]) -> list[dict[str, Any]]:
    """All rows of one shape."""
    experts, norm, rows = Experts(shape), draw(shape.width), []
    for tokens in batches:
        steps = [Step.make(experts, tokens, seed) for seed in range(STEPS)]
        active = sum(step.active() for step in steps) / STEPS
        sources = {"expertplan": kernel_calls(experts, norm), "grouped_mm": library_calls(experts)}
        for engine, calls in sources.items():
            for op, call in calls.items():
                bound = [lambda s=step, i=i, c=call: c(s, i % LAYERS) for i, step in enumerate(steps)]
                took, floor = time_us(bound), floor_us(op, shape, tokens, active, rates)
                row = {"engine": engine, "op": op, "shape": shape.name, "gpus": 1, "batch": tokens}
                row |= {"dtype": "bfloat16", "routes": "uniform", "repeats": STEPS, "active_experts": active}
                rows.append(row | {"time_us": took, "floor_us": floor, "share_of_floor": floor / took})
        print(shape.name, tokens, f"active {active:.1f}", flush=True)
        for row in rows[-len(sources["expertplan"]) - len(sources["grouped_mm"]) :]:
            print(
                f"  {row['engine']:10} {row['op']:13} {row['time_us']:8.1f} us {row['share_of_floor']:7.1%}", flush=True
            )
    return rows


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES))
    parser.add_argument("--batches", default=",".join(map(str, DECODE + PREFILL)))
    parser.add_argument("--no-overlap", action="store_true", help="start no kernel before the one before it ended")
    flags = parser.parse_args()
    copied, read, multiplied = copy_bytes_per_us(), read_bytes_per_us(), matmul_flops_per_us()
    rates = max(copied, read), multiplied
    described = provenance.describe_run(("torch", "triton")) | {"device": f"1x {torch.cuda.get_device_name()}"}
    described |= {"copy_tb_per_s": copied / 1e6, "read_tb_per_s": read / 1e6, "matmul_tflop_per_s": multiplied / 1e6}
    print(described, flush=True)
    rows: list[dict[str, Any]] = []
    batches = tuple(int(size) for size in flags.batches.split(","))
    with mock.patch.object(launch, "_can_overlap", return_value=not flags.no_overlap):
        for shape in SHAPES:
            if shape.name in flags.shapes.split(","):
                rows += [row | {"overlap": not flags.no_overlap} for row in measure(shape, batches, rates)]
                Path(flags.output).write_text(json.dumps(described | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
