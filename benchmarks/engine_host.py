"""What a step costs on the host: the engine's own processor time per step, with a worker that computes nothing.

    python -m benchmarks.engine_host -o benchmarks/results/engine_host.json

Planning, taking tokens in and handing them to listeners that do nothing are counted, in processor time of the engine's
thread, so that what else the machine does hardly matters. In ``steady`` rows the same requests decode throughout; in
``arrivals`` rows four times as many as run at once come with prompts of 512 tokens and get 128 each.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from placement import provenance
from placement.atomic import write_atomically
from runtime.engine import Engine
from runtime.requests import SamplingParameters, TokenEvent
from runtime.settings import EngineSettings
from runtime.step_plan import StepPlan
from runtime.worker_interface import CacheSize

BATCHES = (1, 8, 64, 256)
PROMPT_TOKENS = 512
STEADY_TOKENS, ARRIVING_TOKENS = 1000, 128
WAIT_S = 300


class IdleWorker:
    """Follows plans without a model; every token is the same."""

    group = SimpleNamespace(world_size=1)
    model = SimpleNamespace(can_merge=True, can_pad=True)
    facts = SimpleNamespace(cache=CacheSize(1 << 15, 64))
    everyone_holds_all = overlaps = True
    recording = None
    logprobs: dict[int, Any] = {}  # noqa: RUF012 - never filled

    def __init__(self) -> None:
        self.steps = 0
        self.first_s = self.last_s = 0.0
        self._prompts: dict[int, int] = {}
        self._running: dict[int, int] = {}

    def take_load(self) -> None:
        """Nothing is counted."""

    def launch(self, plan: StepPlan) -> Callable[[], dict[int, int]]:
        """Every sequence that decodes or whose prompt ends gets a token."""
        self.last_s = time.thread_time()
        if self.steps == 0:
            self.first_s = self.last_s
        self.steps += 1
        for sequence in plan.retire:
            self._running.pop(sequence, None)
        tokens = dict(self._running)
        self._prompts.update((admission.sequence, len(admission.tokens)) for admission in plan.admit)
        self._running.update((piece.sequence, 7) for piece in plan.feed if piece.stop == self._prompts[piece.sequence])
        tokens |= self._running
        return lambda: tokens


def measure(batch: int, requests: int, new_tokens: int) -> tuple[int, float]:
    """Steps, and processor seconds of the engine's thread per step."""
    worker, ended = IdleWorker(), threading.Semaphore(0)

    def on_event(event: TokenEvent) -> None:
        if event.finish_reason is not None:
            ended.release()

    engine = Engine(worker, EngineSettings(max_sequences=batch), [1], 1 << 15)  # type: ignore[arg-type]
    for request in range(requests):
        prompt = [request + place for place in range(PROMPT_TOKENS)]
        engine.submit(prompt, SamplingParameters(temperature=0, max_tokens=new_tokens), on_event)
    engine.start()
    for _ in range(requests):
        assert ended.acquire(timeout=WAIT_S)
    engine.shutdown()
    return worker.steps, (worker.last_s - worker.first_s) / worker.steps


def main() -> None:
    """Measure every batch size and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    flags = parser.parse_args()
    rows = []
    for batch in BATCHES:
        for kind, requests, tokens in (("steady", batch, STEADY_TOKENS), ("arrivals", 4 * batch, ARRIVING_TOKENS)):
            steps, seconds = measure(batch, requests, tokens)
            rows.append(
                {"kind": kind, "batch": batch, "requests": requests, "steps": steps, "cpu_ms_per_step": 1e3 * seconds}
            )
            print(f"{kind:>9} batch {batch:>4}: {1e3 * seconds:.3f} ms per step", flush=True)
    document = provenance.describe_run(()) | {"rows": rows}
    write_atomically(Path(flags.output), json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
