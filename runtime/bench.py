"""`python -m runtime bench decode`: milliseconds per decode step by batch size, on a plan's ranks."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from placement import provenance
from placement.atomic import write_atomically
from profiler.errors import InputError
from profiler.trace_header import require_output
from runtime.distributed import RankGroup
from runtime.replay import RouteSource, active_experts, route_source
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.start import Run, load_plan, start_run
from runtime.step_plan import Admission, StepPlan
from runtime.worker_interface import ModelFacts, Tokens

COPY_BYTES = 1 << 28  # several times what a GPU's cache holds
PREFILL_TOKENS = 8192  # fed in one step


@dataclass(frozen=True)
class DecodeBenchmark:
    """What is timed.

    Attributes:
        batch_sizes: sequences decoded together.
        context: tokens of every sequence before the first timed step.
        steps: timed decode steps per batch size.
        warmup_steps: untimed decode steps before them.
        seed: of the random prompts and of drawn routes.
        routes: ``model``, ``uniform``, or a routing trace of the model: which experts the decode steps go to.
        cached: native path: take the context as cached, whatever the cache holds, and feed its last token alone.
    """

    batch_sizes: tuple[int, ...]
    context: int
    steps: int
    warmup_steps: int
    seed: int
    routes: str = "model"
    cached: bool = False

    def __post_init__(self) -> None:
        for name, number in (
            *(("batch_sizes", size) for size in self.batch_sizes),
            ("context", self.context - self.warmup_steps),
            ("steps", self.steps),
        ):
            if number < 1:
                raise InputError(f"{name}: expected at least 1 (context: more than warmup_steps), got {number}")


def bench_decode(plan_path: str, settings: EngineSettings, benchmark: DecodeBenchmark, output: str | None) -> int:
    """Time decode steps and print a row per batch size; returns the exit code."""
    if output is not None:
        require_output(Path(output), [Path(plan_path)])
    plan, model = load_plan(plan_path, settings)
    source = route_source(benchmark.routes, plan.num_experts, plan.top_k, len(plan.layer_ids), benchmark.seed)
    settings = replace(settings, max_sequences=max(settings.max_sequences, *benchmark.batch_sizes))
    run = start_run(plan, model, settings)
    copy_bytes_per_s = measure_copy(run.group.device)
    rows = [time_batch(run, benchmark, batch, source, copy_bytes_per_s) for batch in benchmark.batch_sizes]
    if run.group.rank == 0:
        print(f"{'batch':>6} {'ms/step':>9} {'p95':>9} {'tokens/s':>10}")
        for row in rows:
            figures = f"{row['ms_per_step']:>9.3f} {row['p95_ms_per_step']:>9.3f} {row['tokens_per_s']:>10.0f}"
            print(f"{row['batch']:>6} {figures}")
        if output is not None:
            document = describe_machine(run.group) | {"rows": rows}
            write_atomically(Path(output), json.dumps(document, indent=1) + "\n")
    run.close()
    return 0


def time_batch(
    run: Run,
    benchmark: DecodeBenchmark,
    batch: int,
    source: RouteSource | None = None,
    copy_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """Time decode steps of one batch size; every rank calls this with the same arguments.

    Returns:
        A flat row. A step lasts from the one before to its own tokens: as in the engine, it is begun before the one
        before has ended, where the worker can.
    """
    worker = run.worker
    start_sequences(run, benchmark, batch)
    routes = _replay(run, source, benchmark, batch)
    ended_s = [time.perf_counter()]
    before: Tokens | None = None
    for _ in range(benchmark.warmup_steps + benchmark.steps):
        if run.group.world_size > 1:
            run.group.broadcast_json(StepPlan().to_json())  # as the engine does
        tokens = worker.launch(StepPlan())
        if before is not None:
            before()
            ended_s.append(time.perf_counter())
        before = tokens
    if before is not None:
        before()
    ended_s.append(time.perf_counter())
    times = [end - start for start, end in itertools.pairwise(ended_s[benchmark.warmup_steps :])]
    worker.execute(StepPlan(retire=list(range(batch))))
    worker.replay(None)
    median = statistics.median(times)
    row = describe_run(run, batch, f"{benchmark.context}-{benchmark.context + benchmark.steps}") | {
        "routes": benchmark.routes
        if benchmark.routes in ("model", "uniform")
        else f"replay {Path(benchmark.routes).name}",
        "repeats": len(times),
        "ms_per_step": median * 1e3,
        "p95_ms_per_step": sorted(times)[int(0.95 * (len(times) - 1))] * 1e3,
        "tokens_per_s": batch / median,
    }
    reads = worker.facts.reads
    if routes is not None and reads is not None and run.group.world_size == 1:
        row["active_experts_per_layer"] = active_experts(routes)
        row["bytes_read_per_step"] = reads.total(active_experts(routes), batch, benchmark.context + benchmark.steps / 2)
        if copy_bytes_per_s is not None:
            row["copy_bytes_per_s"] = copy_bytes_per_s
            row["share_of_copy_bandwidth"] = row["bytes_read_per_step"] / median / copy_bytes_per_s
    return row


def start_sequences(run: Run, benchmark: DecodeBenchmark, batch: int) -> None:
    """Prefill random prompts, numbered from 0, dealt to the ranks that hold sequences of their own.

    Raises:
        InputError: the cache is too small for them.
    """
    worker = run.worker
    generator = torch.Generator().manual_seed(benchmark.seed + batch)
    length = benchmark.context - benchmark.warmup_steps
    prompts = torch.randint(worker.facts.vocabulary, (batch, length), generator=generator).tolist()
    new_tokens = benchmark.warmup_steps + benchmark.steps + 1
    greedy = SamplingParameters(temperature=0, seed=0, max_tokens=new_tokens)
    homes = num_homes(run)
    pages = _deal_pages(worker.facts, length + new_tokens, -(-batch // homes))
    cached = length - 1 if benchmark.cached else 0
    admissions = [
        Admission(number, prompt, number % homes, greedy, pages=pages[number // homes], cached=cached)
        for number, prompt in enumerate(prompts)
    ]
    together = max(1, PREFILL_TOKENS // (length - cached)) if worker.model.can_merge else batch
    for start in range(0, batch, together):
        worker.execute(StepPlan.prefill(admissions[start : start + together]))


def _deal_pages(facts: ModelFacts, tokens: int, sequences: int) -> list[list[int]]:
    """Pages for so many sequences of one rank, each with room for so many tokens."""
    if facts.cache is None:
        return [[]] * sequences
    each = -(-tokens // facts.cache.page_size)
    if tokens > facts.max_context or each * sequences > facts.cache.num_pages:
        room = facts.cache.num_pages * facts.cache.page_size
        raise InputError(
            f"{sequences} sequences of up to {tokens} tokens: expected at most {facts.max_context} tokens each, and "
            f"{room} in the cache; ask for fewer or shorter ones, or raise cache_tokens"
        )
    return [list(range(each * number, each * (number + 1))) for number in range(sequences)]


def num_homes(run: Run) -> int:
    """Ranks that sequences are dealt to."""
    return 1 if run.worker.everyone_holds_all else run.group.world_size


def _replay(run: Run, source: RouteSource | None, benchmark: DecodeBenchmark, batch: int) -> torch.Tensor | None:
    """Let this rank's sequences take the source's routes from now on; the routes ``[S, L, T, K]`` of timed steps."""
    if source is None:
        return None
    homes = num_homes(run)
    rank = run.group.rank if homes > 1 else 0
    mine = len(range(rank, batch, homes))
    routes = source.draw(benchmark.warmup_steps + benchmark.steps, mine, rank)
    run.worker.replay(routes)
    return routes[benchmark.warmup_steps :]


def measure_copy(device: torch.device) -> float | None:
    """Bytes per second that a large copy on a GPU reads and writes; None on a CPU."""
    if device.type != "cuda":
        return None
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    for event in events:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize(device)
    best_s = min(before.elapsed_time(after) for before, after in itertools.pairwise(events)) / 1e3
    return 2 * source.nbytes / best_s


def describe_run(run: Run, batch: int, context: str) -> dict[str, Any]:
    """What every row says of its run."""
    return {
        "engine": f"expertplan {run.worker.facts.path}",
        "shape": Path(run.model_path).name,
        "ranks": run.group.world_size,
        "gpus": min(run.group.world_size, torch.cuda.device_count()) if run.group.device.type == "cuda" else 0,
        "backend": run.group.backend,
        "placement": run.plan.strategy,
        "exchange": "allreduce" if run.worker.everyone_holds_all else "alltoall",
        "batch": batch,
        "context": context,
        "dtype": str(run.worker.facts.dtype).removeprefix("torch."),
    }


def describe_machine(group: RankGroup) -> dict[str, Any]:
    """Command, commit, device and versions, as every result file states them."""
    described = provenance.describe_run(("torch", "transformers"))
    if group.device.type == "cuda":
        described["device"] = f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(group.device)}"
    return described
