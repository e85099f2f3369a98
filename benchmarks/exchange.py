"""Time of the exchange between GPUs and of the rule `level`, inside CUDA graphs, beside NCCL's collectives.

    torchrun --nproc-per-node 2 -m benchmarks.exchange -o benchmarks/results/exchange.json

A row's microseconds are the median over replays of a graph of many calls, divided by their number. The exchanges of
this project include what follows them in a decode step: the combination of the pairs, the residual and the norm.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.graph_timing import time_us
from kernels.combine import combine
from kernels.exchange import Mailbox, collect, dispatch, gather, open_mailbox, reduce_add_norm, reduce_combine
from kernels.level_dispatch import DispatchTable, level_slots
from kernels.permute import permute
from kernels.route import Routes
from placement import provenance
from placement.atomic import write_atomically

TOKENS = (1, 8, 32, 128, 256)
WIDTH, TOP_K, EXPERTS = 2048, 8, 128  # of Qwen3-30B-A3B
CALLS, REPLAYS = 24, 30
EPS = 1e-6


def time_together(call: Callable[[], object]) -> float:
    """Median µs of one call that all ranks make together; every rank replays the same number of times."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(CALLS)]
    samples = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / CALLS)
    del kept
    return statistics.median(samples)


def exchange_calls(tokens: int, mailboxes: list[Mailbox]) -> dict[str, Callable[[], object]]:
    """What is timed for so many rows of every rank."""
    rank, world, device = mailboxes[0].rank, mailboxes[0].num_gpus, mailboxes[0].boxes.device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    part, residual, norm = random(tokens, WIDTH), random(tokens, WIDTH), random(WIDTH)
    pairs, all_pairs = random(tokens * TOP_K, WIDTH), random(world * tokens * TOP_K, WIDTH)
    gpus = torch.randint(world, (world, tokens, TOP_K), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(world, tokens, TOP_K, generator=generator).to(device)
    slots = torch.where(gpus == rank, 0, -1).int()
    routes, all_routes = Routes(gpus[0], slots[0], weights[0]), Routes(gpus, slots.flatten(0, 1), weights.flatten(0, 1))
    packed = torch.randint(99, (tokens, 2 * TOP_K), generator=generator, dtype=torch.int32).to(device)
    sent = random(world * tokens, WIDTH)
    received = torch.empty_like(sent)
    return {
        "combine on one GPU": lambda: combine(pairs, routes, None, residual, norm, EPS),
        "reduce_add_norm": lambda: reduce_add_norm(part, residual, norm, EPS, mailboxes[0]),
        "reduce_combine": lambda: reduce_combine(pairs, routes, None, residual, norm, EPS, mailboxes[0]),
        "gather routes": lambda: gather(packed, mailboxes[1]),
        "dispatch": lambda: (gather(packed, mailboxes[1]), dispatch(part, gpus, mailboxes[2])),
        "dispatch and collect": lambda: (
            gather(packed, mailboxes[1]),
            dispatch(part, gpus, mailboxes[2]),
            collect(all_pairs, all_routes, gpus, None, residual, norm, EPS, mailboxes[3]),
        ),
        "NCCL all_reduce": lambda: dist.all_reduce(part),
        "NCCL all_to_all": lambda: dist.all_to_all_single(received, sent),
    }


def level_rows(device: torch.device) -> list[dict[str, Any]]:
    """The rule `level` for one layer and step, with 25% and 100% extra slots."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for gpus in (2, 8):
        for extra in (EXPERTS // 4, EXPERTS):
            table = _random_table(gpus, extra, generator, device)
            for tokens in TOKENS:
                scores = torch.rand(16, tokens, EXPERTS, generator=generator)
                steps = scores.topk(TOP_K).indices.int().to(device)
                row = {"kind": "level", "experts": EXPERTS, "gpus": gpus, "extra_slots": extra, "tokens": tokens}
                row["level_us"] = time_us([lambda ids=ids, table=table: level_slots(ids, table) for ids in steps])  # type: ignore[misc]
                slots = [level_slots(ids, table) for ids in steps]
                most = int(table.slot_of_expert.max()) + 1
                row["permute_us"] = time_us([lambda given=given, most=most: permute(given, most) for given in slots])  # type: ignore[misc]
                rows.append(row)
    return rows


def _random_table(gpus: int, extra: int, generator: torch.Generator, device: torch.device) -> DispatchTable:
    """Experts dealt evenly, and so many second copies on other GPUs."""
    first = torch.randperm(EXPERTS, generator=generator) % gpus
    second = (first + 1 + torch.randint(gpus - 1, (EXPERTS,), generator=generator)) % gpus
    chosen = torch.randperm(EXPERTS, generator=generator)[:extra]
    copies = torch.full((EXPERTS, 2), -1)
    copies[:, 0] = first
    copies[chosen] = torch.stack([first, second], dim=1)[chosen].sort(dim=1).values
    here = (copies == 0).any(dim=1)
    slots = torch.where(here, here.cumsum(0) - 1, -1).int()
    return DispatchTable.build(copies, slots.to(device), 0, gpus, 64)


def main() -> None:
    """Time everything and write the rows on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    flags = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mailboxes = [open_mailbox(dist.group.WORLD, max(TOKENS), WIDTH * 2, device) for _ in range(4)]
    rows: list[dict[str, Any]] = []
    for tokens in TOKENS:
        for name, call in exchange_calls(tokens, mailboxes).items():
            row = {"kind": "exchange", "what": name, "gpus": world, "tokens": tokens, "width": WIDTH}
            rows.append(row | {"dtype": "bfloat16", "repeats": REPLAYS, "us": time_together(call)})
            if name.startswith("reduce") and world > 2:
                with mock.patch("kernels.exchange.TWO_WAY_BYTES", 0):
                    rows.append(rows[-1] | {"what": f"{name}, two ways", "us": time_together(call)})
    dist.barrier()
    if rank == 0:
        rows += level_rows(device)
        for row in rows:
            print(*(f"{key}={value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
        document = provenance.describe_run(("torch", "triton")) | {"rows": rows}
        document["device"] = f"{world}x {torch.cuda.get_device_name(device)}"
        write_atomically(Path(flags.output), json.dumps(document, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
