"""Time and memory of ``python -m profiler stats`` on long traces of the shape of Qwen3-30B-A3B.

    python -m benchmarks.profiler_statistics [--tokens 1000000 10000000] [-o FILE]

The trace is synthetic: tokens of four domains, each drawn from a pool of seeded routes of its own. Time is that of the
whole command, from its start to its end: reading and checking the trace, counting, controls, tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.placement_generators import MIDDLE, SyntheticRouting
from placement.atomic import write_atomically
from placement.provenance import CHECKOUT, describe_run
from profiler.trace_format import TraceWriter

RESULTS = CHECKOUT / "benchmarks" / "results"
NUM_DOMAINS = 4
TOKENS_PER_SEQUENCE = 500


def write_long_trace(path: Path, shape: SyntheticRouting, num_tokens: int) -> None:
    """Write a trace of so many tokens, half of each sequence in decode steps."""
    pools = [replace(shape, seed=seed).routes() for seed in range(NUM_DOMAINS)]
    generator = np.random.default_rng(0)
    with TraceWriter(
        path,
        model="synthetic",
        num_experts=shape.num_experts,
        layer_ids=range(shape.num_layers),
        top_k=shape.top_k,
        weights=False,
        token_ids=False,
    ) as writer:
        while writer.num_tokens < num_tokens:
            length = min(TOKENS_PER_SEQUENCE, num_tokens - writer.num_tokens)
            domain = writer.num_sequences % NUM_DOMAINS
            experts_TLK = pools[domain][generator.integers(0, shape.num_tokens, length)]
            decode_T = np.arange(length) >= length // 2
            writer.add_sequence(experts_TLK, decode=decode_T, domain=f"domain {domain}")


def measure(trace: Path, output: Path) -> dict[str, float]:
    """Run ``stats`` in a process of its own: seconds, and the most memory it held, with mapped pages of the file."""
    command = [sys.executable, "-m", "profiler", "stats", str(trace), "-o", str(output)]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_rss_gib": usage.ru_maxrss / 2**20}


def main() -> None:
    """Measure, print a row per run, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="where the traces are made, 4 GB for 10 million tokens")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "profiler_statistics.json")
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for num_tokens in flags.tokens:
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            trace = Path(folder) / "trace.safetensors"
            write_long_trace(trace, MIDDLE, num_tokens)
            for suffix in ("json", "safetensors"):
                row = {
                    "engine": "expertplan profiler stats",
                    "shape": "synthetic, as Qwen3-30B-A3B",
                    "layers": MIDDLE.num_layers,
                    "experts": MIDDLE.num_experts,
                    "top_k": MIDDLE.top_k,
                    "domains": NUM_DOMAINS,
                    "tokens": num_tokens,
                    "trace_gib": trace.stat().st_size / 2**30,
                    "output": suffix,
                    "repeats": 1,
                    **measure(trace, Path(folder) / f"statistics.{suffix}"),
                }
                rows.append(row)
                figures = f"{row['seconds']:.1f} s, {row['peak_rss_gib']:.2f} GiB"
                print(f"{num_tokens:>11,} tokens, -o .{suffix}: {figures}", flush=True)
    document = describe_run(("numpy", "numba", "scipy")) | {"rows": rows}
    write_atomically(flags.output, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
