"""What a placement gains on GPUs: decode steps of one shape by several plans, with the same routes of a trace.

    python -m placement solve --trace TRACE -o plans/eplb-25.json strategy=eplb slots_per_gpu=+25% cluster=h200x2
    …
    torchrun --nproc-per-node 2 -m benchmarks.placement_gains --shape gpt-oss-20b --routes TRACE -o gains.json plans/*

The weights are random and loaded once: every rank has all experts, and takes as many as the plan gives it slots. Routes
are those of the trace's odd sequences, which no plan was solved on. A row has the time of a whole step and of its MoE
layers alone (router, choice among copies, experts, exchange, norm), and what the busiest GPU had to do on average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.skinny_linear import skinny_linear
from placement.atomic import write_atomically
from placement.dispatch import dispatch_tokens
from placement.plan import PlacementPlan
from runtime.bench import DecodeBenchmark, describe_machine, time_batch
from runtime.distributed import RankAddress, RankGroup
from runtime.native.experts import moe_layer
from runtime.native.forward import Decoder
from runtime.native.loading import choose_native, load_native
from runtime.native.model import NativeModel, bucket_of
from runtime.native.replayed_routes import ReplayedRoutes
from runtime.native.weights import ExpertWeights
from runtime.replay import RouteSource, route_source
from runtime.settings import EngineSettings
from runtime.start import Run, join_group

SHAPES = Path(__file__).parent / "shapes"


def everything(plan: PlacementPlan) -> PlacementPlan:
    """All experts on every GPU."""
    layer = (tuple(range(plan.num_experts)),) * plan.num_gpus
    return replace(plan, slots=(layer,) * len(plan.layer_ids), strategy="everything")


def take_slots(decoder: Decoder, full: dict[int, ExpertWeights], plan: PlacementPlan, rank: int) -> None:
    """Give every layer as many of its experts' weights as the plan gives this rank slots."""
    for index, number in enumerate(plan.layer_ids):
        held, whole = plan.slots[index][rank], full[number]
        slot_of_expert = torch.full((plan.num_experts,), -1, dtype=torch.int32)
        slot_of_expert[list(held)] = torch.arange(len(held), dtype=torch.int32)

        def first(tensor: torch.Tensor | None, number: int = len(held)) -> Any:
            return None if tensor is None else tensor[:number]

        decoder.weights.layers[number].experts = replace(
            whole,
            gate_up=first(whole.gate_up),
            gate_up_bias=first(whole.gate_up_bias),
            down=first(whole.down),
            down_bias=first(whole.down_bias),
            slot_of_expert=slot_of_expert.to(whole.slot_of_expert.device),
            dispatch=None,
        )
    assert decoder.ranks is not None
    decoder.ranks.place(decoder.weights, plan)


def busiest(plan: PlacementPlan, routes: torch.Tensor) -> dict[str, float]:
    """Active experts and pairs on the busiest GPU, averaged over steps and layers of routes ``[S, L, T, K]``."""
    active, pairs = [], []
    for index in range(len(plan.layer_ids)):
        copies, limit = np.asarray(plan.copies(index)), plan.dispatch.split_above_tokens
        for experts in routes[:, index].numpy():
            gpus = dispatch_tokens(experts, copies, plan.num_gpus, limit)
            pairs.append(np.bincount(gpus.ravel(), minlength=plan.num_gpus).max())
            both = np.unique(gpus.ravel().astype(np.int64) * plan.num_experts + experts.ravel())
            active.append(np.bincount(both // plan.num_experts, minlength=plan.num_gpus).max())
    return {"active_on_busiest_gpu": float(np.mean(active)), "pairs_on_busiest_gpu": float(np.mean(pairs))}


@torch.inference_mode()
def time_moe_layers(model: NativeModel, routes: torch.Tensor) -> float:
    """Median ms of all MoE layers of a step, one after the other without attention, on routes ``[S, L, T, K]``."""
    decoder = model.decoder
    device, norm = decoder.rotary.device, decoder.weights.norm
    rows = bucket_of(routes.shape[2], model.max_sequences)
    decoder.replace_routes = replayed = ReplayedRoutes(decoder, routes, rows)
    load, decoder.load = decoder.load, None
    places = torch.zeros(rows, dtype=torch.int64, device=device)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, decoder.shape.width, generator=generator).to(device, norm.dtype)

    def run() -> torch.Tensor:
        residual = normed = hidden
        for number, layer in enumerate(decoder.weights.layers):
            if layer.experts is not None and decoder.ranks is not None:
                logits = skinny_linear(normed, layer.experts.router, layer.experts.router_bias)
                residual, normed = moe_layer(decoder, number, normed, logits, places, residual, layer.mlp_norm)
        return normed

    step: Callable[[], object] = run
    if device.type == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        step = graph.replay
    times = []
    for _ in range(len(routes)):
        replayed.advance()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start_s) * 1e3)
    decoder.replace_routes, decoder.load = None, load
    return statistics.median(times)


def measure(run: Run, source: RouteSource, benchmark: DecodeBenchmark, extra_slots: float) -> list[dict[str, Any]]:
    """One plan, every batch."""
    rows = []
    for batch in benchmark.batch_sizes:
        routes = source.draw(benchmark.warmup_steps + benchmark.steps, batch)
        row = {"kind": "decode", "extra_slots": extra_slots} | time_batch(run, benchmark, batch, source)
        row["moe_ms_per_step"] = time_moe_layers(run.worker.model, routes)
        rows.append(row | busiest(run.plan, routes))
        if run.group.rank == 0:
            figures = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
            print(run.plan.strategy, batch, figures, flush=True)
    return rows


def start(flags: argparse.Namespace, plan: PlacementPlan, batches: tuple[int, ...]) -> Run:
    """The shape with all experts on every rank, and room for the largest batch alone."""
    address = RankAddress.from_environment()
    if address is None:
        sys.exit("error: no RANK is set; start me with torchrun, see --help")
    folder = flags.shape if Path(flags.shape).is_dir() else str(SHAPES / flags.shape)
    room = max(batches) * (flags.context + flags.steps + 2 * 64)
    settings = EngineSettings(
        weights="random", path="native", device=flags.device, max_sequences=max(batches), cache_tokens=room
    )
    group: RankGroup = join_group(address, settings)
    shape = choose_native(folder, settings, group)
    assert shape is not None
    return Run(plan, folder, group, load_native(plan, folder, shape, settings, group, capture=False), None)


def main() -> None:
    """Measure all plans and write the rows on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", help="files of plans for this many GPUs")
    parser.add_argument("--shape", required=True, help="folder of benchmarks/shapes, or another with a config.json")
    parser.add_argument("--routes", required=True, help="routing trace of the shape, or uniform")
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--batches", default="1,4,8,16,32,128")
    parser.add_argument("--context", type=int, default=136)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--device", default="cuda")
    flags = parser.parse_args()
    plans = [PlacementPlan.load(path) for path in flags.plans]
    batches = tuple(int(size) for size in flags.batches.split(","))
    run = start(flags, everything(plans[0]), batches)
    decoder, rank = run.worker.model.decoder, run.group.rank
    layers = enumerate(decoder.weights.layers)
    full = {number: layer.experts for number, layer in layers if layer.experts is not None}
    source = route_source(flags.routes, plans[0].num_experts, plans[0].top_k, len(plans[0].layer_ids), 0)
    assert source is not None
    benchmark = DecodeBenchmark(batches, flags.context, flags.steps, 4, 0, flags.routes)
    rows = []
    for plan in plans:
        take_slots(decoder, full, plan, rank)
        run.plan = plan
        slots = sum(len(gpu) for gpu in plan.slots[0])
        rows += measure(run, source, benchmark, slots / plan.num_experts - 1)
    if rank == 0:
        write_atomically(Path(flags.output), json.dumps(describe_machine(run.group) | {"rows": rows}, indent=1) + "\n")
    run.close()


if __name__ == "__main__":
    main()
