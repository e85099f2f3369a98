"""Time per decode step of the native path for a published shape with random weights, and what a step's time goes to.

    python -m benchmarks.native_decode --shape qwen3-30b-a3b -o benchmarks/results/native_decode.json
    torchrun --nproc-per-node 2 -m benchmarks.native_decode --shape qwen3-30b-a3b -o native_ranks.json

Every row states the copy bandwidth measured in the same run and the share of it that the step's reads make. With
``--profile`` one more step per batch is traced, and the kernels it spent most time in are rows of kind ``profile``:
from the end of the kernel before to a kernel's own end, since kernels overlap.
With ``--cached`` long contexts are not fed: random keys and values fill the cache. Rows of the device, shape, batch and
context that the file has already are replaced.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.expert_parallel_decode import make_plan
from placement.atomic import write_atomically
from placement.plan import PlacementPlan
from runtime.bench import DecodeBenchmark, describe_machine, measure_copy, start_sequences, time_batch
from runtime.distributed import RankAddress
from runtime.launcher import LocalRanks
from runtime.native.loading import choose_native, load_native
from runtime.replay import RouteSource, route_source
from runtime.settings import EngineSettings
from runtime.start import Run, join_group
from runtime.step_plan import StepPlan

SHAPES = Path(__file__).parent / "shapes"
KERNEL_ROWS = 16
KEYS = {"device": None, "shape": None, "ranks": 1, "placement": "contiguous", "batch": None, "context": None}


def start(flags: argparse.Namespace, batches: list[int]) -> tuple[Run, RouteSource | None]:
    """The shape on this machine's GPUs, with room for the largest batch alone."""
    folder = str(SHAPES / flags.shape)
    room = max(batches) * (flags.context + flags.steps + flags.warmup_steps + 2 * 64)
    settings = EngineSettings(
        weights="random", path="native", device=flags.device, max_sequences=max(batches), cache_tokens=room
    )
    address = RankAddress.from_environment()  # torchrun's
    ranks = None
    if address is None:
        ranks = LocalRanks(1)
        address = ranks.address
    group = join_group(address, settings)
    shape = choose_native(folder, settings, group)
    assert shape is not None
    layers = [layer for layer, routed in enumerate(shape.moe_layers) if routed]
    if Path(flags.plan).is_file():
        plan = PlacementPlan.load(flags.plan)
    else:
        plan = make_plan(flags.plan, shape.num_experts, shape.top_k, layers, group.world_size)
    worker = load_native(plan, folder, shape, settings, group, capture=False)
    source = route_source(flags.routes, shape.num_experts, shape.top_k, len(layers), 0)
    if flags.cached:
        for layer in itertools.chain(
            *(held for held in vars(worker.model.decoder.cache).values() if isinstance(held, list))
        ):
            layer.normal_()
    return Run(plan, folder, group, worker, ranks), source


def profile_step(run: Run, benchmark: DecodeBenchmark, batch: int, source: RouteSource | None) -> list[dict[str, Any]]:
    """The kernels of one decode step, by falling time."""
    start_sequences(run, benchmark, batch)
    if source is not None:
        run.worker.replay(source.draw(3, batch))
    for _ in range(2):
        run.worker.execute(StepPlan())
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        run.worker.execute(StepPlan())
        torch.cuda.synchronize()
    run.worker.execute(StepPlan(retire=list(range(batch))))
    run.worker.replay(None)
    events = (event for event in traced.events() or () if event.device_type == DeviceType.CUDA)
    spent: dict[str, list[float]] = {}
    ended = None
    for event in sorted(events, key=lambda event: event.time_range.end):
        begun = event.time_range.start if ended is None else ended
        spent.setdefault(event.name, []).append(event.time_range.end - begun)
        ended = event.time_range.end
    found = sorted(spent.items(), key=lambda each: -sum(each[1]))[:KERNEL_ROWS]
    return [
        {
            "kind": "profile",
            "device": device_name(run),
            "shape": Path(run.model_path).name,
            "ranks": run.group.world_size,
            "placement": run.plan.strategy,
            "batch": batch,
            "context": f"{benchmark.context}-{benchmark.context + benchmark.steps}",
            "kernel": name[:90],
            "calls_per_step": len(times),
            "us_per_step": sum(times),
        }
        for name, times in found
    ]


def show(rows: list[dict[str, Any]], batch: int) -> None:
    """Print the rows of one batch."""
    for row in rows:
        if row["batch"] == batch and row["kind"] == "decode":
            figures = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
            print(row["shape"], row["ranks"], row["placement"], "batch", batch, figures, flush=True)
        elif row["batch"] == batch:
            print(f"{row['us_per_step']:>10.1f} us {row['calls_per_step']:>5} x {row['kernel']}", flush=True)


def device_name(run: Run) -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name() if run.group.device.type == "cuda" else "CPU"


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells runs apart."""
    return tuple(row.get(key, default) for key, default in KEYS.items())


def merge(output: Path, document: dict[str, Any]) -> None:
    """Write the document together with the rows that the file has of other runs."""
    rows = document["rows"]
    if output.exists():
        mine = {key_of(row) for row in rows}
        document["rows"] = [row for row in json.loads(output.read_text())["rows"] if key_of(row) not in mine] + rows
    write_atomically(output, json.dumps(document, indent=1) + "\n")


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help="folder of benchmarks/shapes")
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--batches", default="1,8,32,128,256")
    parser.add_argument("--context", type=int, default=136, help="tokens before the first timed step")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--warmup-steps", type=int, default=8)
    parser.add_argument("--routes", default="uniform")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--plan", default="contiguous", help="contiguous, shuffled, copies (25%% more), or a plan's file"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cached", action="store_true", help="long contexts: fill the cache with random numbers")
    parser.add_argument("--commit", help="of a copy without git history")
    return parser.parse_args()


def main() -> None:
    """Time every batch size, and profile a step of each if asked."""
    flags = parse_flags()
    batches = [int(size) for size in flags.batches.split(",")]
    run, source = start(flags, batches)
    benchmark = DecodeBenchmark(
        tuple(batches), flags.context, flags.steps, flags.warmup_steps, 0, flags.routes, flags.cached
    )
    copy_bytes_per_s = measure_copy(run.group.device)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        row: dict[str, Any] = {
            "kind": "decode",
            "device": device_name(run),
        }
        row |= time_batch(run, benchmark, batch, source, copy_bytes_per_s)
        rows.append(row)
        if flags.profile:
            rows += profile_step(run, benchmark, batch, source)
        if run.group.rank == 0:
            show(rows, batch)
    document = describe_machine(run.group)
    document["commit"] = flags.commit or document["commit"]
    if run.group.rank == 0:
        merge(Path(flags.output), document | {"rows": rows})
    run.close()


if __name__ == "__main__":
    main()
