"""The time of a piece of work on this rank's device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

SAMPLES = 3
SAMPLE_S = 2e-3  # each sample repeats the work for at least so long


def time_calls_us(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median time of one call in µs, all of them run one after the other.

    On GPUs they run in one CUDA graph, as the decode step does; on CPUs directly.

    Args:
        calls: the same work on different data, so much of it that no cache holds it.
        device: that they run on.
    """
    if device.type != "cuda":
        return 1e6 * _median_s(lambda: [call() for call in calls]) / len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # alive until the graph is dropped

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(device)

    repeats = max(1, int(SAMPLE_S / max(_median_s(replay, 1), 1e-6)))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(SAMPLES):
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / repeats)
    del kept
    return statistics.median(samples) / len(calls)


def _median_s(work: Callable[[], object], samples: int = SAMPLES) -> float:
    """Median time of a piece of work that ends when it returns; the first time does not count."""
    work()
    times = []
    for _ in range(samples):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)
