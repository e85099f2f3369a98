"""Many concurrent streams for minutes on the bundled model: no error, flat memory, and no stream left behind.

    python -m benchmarks.serving_soak -o benchmarks/results/serving_soak.json

Starts `python -m runtime serve` on CPU ranks, with recording switched on, and lets every stream send one request after
the other. Memory is what the kernel counts as resident, rank by rank. The exit code is 1 where a criterion fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.expert_parallel_decode import make_plan
from placement import provenance
from placement.atomic import write_atomically
from runtime.bench_serve_figures import count_errors, measure
from runtime.bench_serve_load import PATHS, Answer, Target, send

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "demo-moe"
START_UP_S, END_S = 180, 60
SAMPLE_S = 1.0
WARM_UP_SHARE = 0.2  # of the time, in which memory may grow
MOST_GROWTH = 0.05  # of a rank's memory after that, between its first and its last quarter
LEAST_FAIRNESS = 0.5  # tokens per second of the slowest stream over the median stream's
PROMPT_TOKENS, NEW_TOKENS = (4, 96), (16, 128)


@dataclass
class Stream:
    """What one stream has got.

    Attributes:
        answers: of its requests.
        seconds: from its first request to the end of its last.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens by time."""
        return sum(answer.output_tokens for answer in self.answers) / self.seconds


@contextlib.contextmanager
def running_server(folder: Path, flags: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The server on its ranks; its URL and process group. It must end in order."""
    config = json.loads((MODEL / "config.json").read_text())
    layers = list(range(config["num_hidden_layers"]))
    plan = make_plan("copies", config["num_local_experts"], config["num_experts_per_tok"], layers, flags.ranks)
    plan.save(folder / "plan.json")
    settings = [f"model={MODEL}", "port=0", "device=cpu", f"max_sequences={flags.streams}"]
    settings += [f"record={folder / 'routes'}", "record_rate=0.1", f"exchange={flags.exchange}"]
    command = [sys.executable, "-m", "runtime", "serve", "--plan", str(folder / "plan.json"), *settings]
    log = folder / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stderr, stderr=stderr, start_new_session=True)
    try:
        yield wait_ready(process, log), process.pid
        process.send_signal(signal.SIGTERM)
        if process.wait(END_S) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The URL, once it serves."""
    deadline = time.monotonic() + START_UP_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"serving .* on (http://\S+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


def resident_bytes(process_group: int) -> dict[int, int]:
    """Resident memory of every rank in a process group, with what it started itself."""
    found: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group == process_group:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                pages = int((folder / "statm").read_text().split()[1])
                number = int(rank[1]) if rank else 0
                found[number] = found.get(number, 0) + pages * os.sysconf("SC_PAGE_SIZE")
    return found


async def follow_memory(process_group: int, samples: list[dict[int, int]]) -> None:
    """Add a sample per second until cancelled."""
    while True:
        samples.append(resident_bytes(process_group))
        await asyncio.sleep(SAMPLE_S)


async def run_stream(client: httpx.AsyncClient, stream: Stream, seed: int, deadline_s: float, vocabulary: int) -> None:
    """One request after the other, of drawn lengths, until the time is over."""
    rng = np.random.default_rng(seed)
    start_s = time.perf_counter()
    while time.perf_counter() < deadline_s:
        prompt = [int(token) for token in rng.integers(3, vocabulary, rng.integers(*PROMPT_TOKENS))]
        target = Target("", "completions", MODEL.name, int(rng.integers(*NEW_TOKENS)), temperature=1.0)
        answer = Answer()
        await send(client, PATHS["completions"], json.dumps(target.body(prompt)).encode(), answer)
        stream.answers.append(answer)
        stream.seconds = time.perf_counter() - start_s
        if answer.error is not None:
            await asyncio.sleep(0.1)


async def soak(url: str, process_group: int, flags: argparse.Namespace) -> tuple[list[Stream], list[dict[int, int]]]:
    """Run all streams side by side; what they got, and the ranks' memory second by second."""
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    streams = [Stream() for _ in range(flags.streams)]
    samples: list[dict[int, int]] = []
    watch = asyncio.create_task(follow_memory(process_group, samples))
    deadline_s = time.perf_counter() + flags.seconds
    async with Target(url, "completions", MODEL.name, 1).client() as client:
        await asyncio.gather(
            *(run_stream(client, stream, seed, deadline_s, vocabulary) for seed, stream in enumerate(streams))
        )
    watch.cancel()
    return streams, samples


def growth(samples: list[int]) -> float:
    """By which share memory grew from the first quarter after the warm-up to the last quarter, by their medians."""
    steady = samples[int(len(samples) * WARM_UP_SHARE) :]
    quarter = max(1, len(steady) // 4)
    first, last = statistics.median(steady[:quarter]), statistics.median(steady[-quarter:])
    return last / first - 1


def judge(streams: list[Stream], samples: list[dict[int, int]], flags: argparse.Namespace) -> dict[str, Any]:
    """The row, with every criterion and whether it holds."""
    answers = [answer for stream in streams for answer in stream.answers]
    rates = [stream.tokens_per_s for stream in streams]
    fairness = min(rates) / statistics.median(rates)
    complete = [sample for sample in samples if len(sample) == flags.ranks]
    grown = {rank: growth([sample[rank] for sample in complete]) for rank in range(flags.ranks)}
    errors = count_errors(answers)
    row: dict[str, Any] = {
        "kind": "soak",
        "engine": "expertplan universal",
        "shape": MODEL.name,
        "ranks": flags.ranks,
        "exchange": flags.exchange,
        "recorded_share": 0.1,
        "streams": flags.streams,
        "asked_seconds": flags.seconds,
        "load_average": os.getloadavg()[0],
    }
    row |= measure(answers, {})
    row |= {
        "median_stream_tokens_per_s": statistics.median(rates),
        "slowest_stream_tokens_per_s": min(rates),
        "slowest_over_median": fairness,
    }
    for rank, share in grown.items():
        row |= {
            f"rank{rank}_resident_mb_at_warm_up": complete[int(len(complete) * WARM_UP_SHARE)][rank] / 1e6,
            f"rank{rank}_resident_mb_at_end": complete[-1][rank] / 1e6,
            f"rank{rank}_growth": share,
        }
    return row | {
        "errors": "; ".join(f"{times} x {error}" for error, times in errors),
        "no_error": not errors,
        "fair": fairness >= LEAST_FAIRNESS,
        "memory_flat": max(grown.values()) <= MOST_GROWTH,
    }


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the row")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--exchange", default="allreduce", choices=("allreduce", "alltoall"))
    return parser.parse_args()


def main() -> int:
    """Soak, write the row, and say which criteria hold."""
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder), flags) as (url, process_group):
        streams, samples = asyncio.run(soak(url, process_group, flags))
    row = judge(streams, samples, flags)
    document = provenance.describe_run(("torch", "transformers", "fastapi", "uvicorn")) | {"rows": [row]}
    write_atomically(Path(flags.output), json.dumps(document, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return 0 if row["no_error"] and row["fair"] and row["memory_flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
