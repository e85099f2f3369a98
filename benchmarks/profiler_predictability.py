"""How well predictors tell a layer's experts before its router runs, on the public trace and on the demo model.

    python -m benchmarks.profiler_predictability [-o FILE]

The public trace is gpt-oss-20b.safetensors in the folder that EXPERTPLAN_TRACES names (default ../shared/traces); the
demo model is traced anew. Of every trace: rows of means over the layers that all predictors tell, by batch size and by
choices (all K, or first choices alone), and rows by layer for batches of 32 tokens. ``seconds`` is the time of learning
and judging all predictors of the trace together; the synthetic trace is there for it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.placement_generators import SyntheticRouting
from placement.atomic import write_atomically
from placement.provenance import CHECKOUT, describe_run
from profiler.predictors.scoring import BATCH_TOKENS, NUM_BATCHES, score_predictors
from profiler.predictors.table import predictability_table, shared_layers
from profiler.profile import PredictorScore
from profiler.trace_format import RoutingTrace, TraceWriter

RESULTS = CHECKOUT / "benchmarks" / "results"
DEMO_COMMAND = ("model=examples/demo-moe", "prompts=examples/prompts/solve.jsonl", "token_ids=true", "gate_ahead=true")
BATCHES = (8, BATCH_TOKENS, 128, 512)
LARGE = SyntheticRouting(58, 256, 8, 50_000)
TOKENS_PER_SEQUENCE = 500
Row = dict[str, Any]


@contextmanager
def public_trace() -> Iterator[RoutingTrace]:
    """gpt-oss-20b."""
    folder = Path(os.environ.get("EXPERTPLAN_TRACES", CHECKOUT.parent / "shared" / "traces"))
    with RoutingTrace.open(folder / "gpt-oss-20b.safetensors") as trace:
        yield trace


@contextmanager
def demo_trace() -> Iterator[RoutingTrace]:
    """The bundled model on the bundled prompts, traced in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.safetensors"
        command = [sys.executable, "-m", "profiler", "trace", *DEMO_COMMAND, "-o", str(path)]
        subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL)
        with RoutingTrace.open(path) as trace:
            yield trace


@contextmanager
def large_trace() -> Iterator[RoutingTrace]:
    """Synthetic routes of 58 layers of 256 experts, with random token ids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        routes_TLK, generator = LARGE.routes(), np.random.default_rng(0)
        with TraceWriter(
            path,
            model="synthetic",
            num_experts=LARGE.num_experts,
            layer_ids=range(LARGE.num_layers),
            top_k=LARGE.top_k,
            weights=False,
            token_ids=True,
        ) as writer:
            for start in range(0, len(routes_TLK), TOKENS_PER_SEQUENCE):
                experts = routes_TLK[start : start + TOKENS_PER_SEQUENCE]
                ids = generator.integers(0, 10_000, len(experts))
                writer.add_sequence(experts, decode=np.ones(len(experts), bool), token_ids=ids)
        with RoutingTrace.open(path, validate=False) as trace:
            yield trace


def measure(name: str, trace: RoutingTrace, batch: int, choices: int | None, by_layer: bool) -> list[Row]:
    """Judge all predictors once; a row per predictor, and per layer where that is asked for."""
    started = time.perf_counter()
    scores = score_predictors(trace, choices=choices, batch_tokens=batch)
    seconds = time.perf_counter() - started
    if by_layer:
        Console(width=140).print(name, predictability_table(scores))
    rows = []
    for score in scores:
        common = {
            "trace": name,
            "experts": trace.num_experts,
            "choices": choices or trace.top_k,
            "batch": batch,
            "repeats": NUM_BATCHES,
            "learned_tokens": score.learned_tokens,
            "judged_tokens": score.judged_tokens,
            "predictor": score.predictor,
        }
        shared = shared_layers(scores)
        mean = {"layer": "mean", "layers": len(shared), "seconds": round(seconds, 2)}
        rows.append(common | mean | rates(score, np.isin(score.layer_ids, shared)))
        if by_layer:
            for layer_id in score.layer_ids:
                layer = {"layer": layer_id, "layers": 1, "seconds": None}
                rows.append(common | layer | rates(score, np.equal(score.layer_ids, layer_id)))
    return rows


def rates(score: PredictorScore, kept: np.ndarray) -> Row:
    """Rates as fractions, means over some of the layers."""
    assert score.hit_rate_at is not None
    by_name = {
        "hit_rate": score.hit_rate,
        "top1_hit_rate": score.top1_hit_rate,
        "batch_accuracy": score.batch_accuracy,
        "replan_rate": score.replan_rate,
        "backed_off": score.backed_off,
    } | {f"hit_rate_at_{k}": at for k, at in enumerate(score.hit_rate_at.T, start=1)}
    return {name: None if rate is None else round(float(rate[kept].mean()), 5) for name, rate in by_name.items()}


def main() -> None:
    """Measure, print a table per trace, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "profiler_predictability.json")
    flags = parser.parse_args()
    rows: list[Row] = []
    for name, open_trace in (("gpt-oss-20b", public_trace), ("demo-moe", demo_trace)):
        with open_trace() as trace:
            score_predictors(trace, num_batches=1)  # compiles the loops, so that seconds are those of a second run
            for choices in (None, 1):
                for batch in BATCHES:
                    rows += measure(name, trace, batch, choices, by_layer=batch == BATCH_TOKENS and choices is None)
    with large_trace() as trace:
        rows += measure("synthetic 58x256", trace, BATCH_TOKENS, None, by_layer=False)
    write_atomically(flags.output, json.dumps(describe_run(("numpy", "numba")) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
