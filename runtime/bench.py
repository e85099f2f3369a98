"""`python -m runtime bench decode`: milliseconds per decode step by batch size, on a plan's ranks."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from placement.atomic import write_atomically
from placement.plan import PlacementPlan
from profiler.errors import InputError
from runtime.serve import follow
from runtime.settings import EngineSettings
from runtime.start import Run, load_plan, start_run
from runtime.step_plan import Admission, StepPlan


@dataclass(frozen=True)
class DecodeBenchmark:
    """What is timed.

    Attributes:
        batch_sizes: sequences decoded together.
        context: tokens of every sequence before the first timed step.
        steps: timed decode steps per batch size.
        warmup_steps: untimed decode steps before them.
        seed: of the random prompts.
    """

    batch_sizes: tuple[int, ...]
    context: int
    steps: int
    warmup_steps: int
    seed: int

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
    plan, model = load_plan(plan_path, settings)
    run = start_run(plan, model, settings)
    if run.group.rank != 0:
        return follow(run)
    rows = []
    print(f"{'batch':>6} {'ms/step':>9} {'p95':>9} {'tokens/s':>10}")
    for batch in benchmark.batch_sizes:
        times = _time_batch(run, benchmark, batch)
        row = _row(run, plan, settings, benchmark, batch, times)
        rows.append(row)
        print(f"{batch:>6} {row['ms_per_step']:>9.3f} {row['p95_ms_per_step']:>9.3f} {row['tokens_per_s']:>10.0f}")
    _send(run, StepPlan(stop=True))
    run.close()
    if output is not None:
        document = {"command": _command(), "commit": _commit(), "device": _device(run), "versions": _versions()}
        write_atomically(Path(output), json.dumps(document | {"rows": rows}, indent=1) + "\n")
    return 0


def _time_batch(run: Run, benchmark: DecodeBenchmark, batch: int) -> list[float]:
    """Seconds of every timed step; each ends with the new tokens on all ranks."""
    generator = torch.Generator().manual_seed(benchmark.seed + batch)
    vocabulary = run.worker.model.model.config.get_text_config().vocab_size
    length = benchmark.context - benchmark.warmup_steps
    prompts = torch.randint(vocabulary, (batch, length), generator=generator).tolist()
    together = max(1, 8192 // length)
    homes = 1 if run.worker.everyone_holds_all else run.group.world_size
    admissions = [Admission(number, prompt, number % homes, 0.0, 1.0, 0) for number, prompt in enumerate(prompts)]
    groups = [admissions[start : start + together] for start in range(0, batch, together)]
    if not run.worker.model.can_merge:
        groups = [admissions]
    for group in groups:
        _send(run, StepPlan(admit=group))
    times = []
    for step in range(benchmark.warmup_steps + benchmark.steps):
        start = time.perf_counter()
        _send(run, StepPlan())
        if step >= benchmark.warmup_steps:
            times.append(time.perf_counter() - start)
    _send(run, StepPlan(retire=list(range(batch))))
    return times


def _send(run: Run, step: StepPlan) -> None:
    """Let every rank execute a step."""
    run.group.broadcast_json(step.to_json())
    if not step.stop:
        run.worker.execute(step)


def _row(
    run: Run,
    plan: PlacementPlan,
    settings: EngineSettings,
    benchmark: DecodeBenchmark,
    batch: int,
    times: list[float],
) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "engine": "expertplan universal",
        "shape": run.model_path,
        "weights": settings.weights,
        "gpus": run.group.world_size,
        "device": run.group.device.type,
        "placement": plan.strategy,
        "exchange": settings.exchange or plan.workload.exchange,
        "batch": batch,
        "context": f"{benchmark.context}-{benchmark.context + benchmark.steps}",
        "dtype": str(run.worker.model.model.dtype).removeprefix("torch."),
        "routes": "model",
        "repeats": len(times),
        "ms_per_step": median * 1e3,
        "p95_ms_per_step": sorted(times)[int(0.95 * (len(times) - 1))] * 1e3,
        "tokens_per_s": batch / median,
    }


def _command() -> str:
    return "python -m runtime " + shlex.join(sys.argv[1:])


def _commit() -> str | None:
    """The checkout's commit, None outside of one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def _device(run: Run) -> str:
    if run.group.device.type == "cuda":
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(run.group.device)}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def _versions() -> dict[str, str]:
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
