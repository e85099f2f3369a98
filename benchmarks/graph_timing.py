"""Times of kernels inside CUDA graphs, and the ceilings of the card they are judged by."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

SAMPLES = 5
SAMPLE_US = 4000.0  # each sample replays the graph for at least so long


def time_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call in µs, when all calls run one after the other in one CUDA graph.

    Args:
        calls: the same work on different data, so much of it that no cache holds it.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # alive until the graph is dropped
    replays = max(1, int(SAMPLE_US / max(_replay_us(graph, 2), 1.0)))
    samples = [_replay_us(graph, replays) for _ in range(SAMPLES)]
    del kept
    return statistics.median(samples) / len(calls)


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Mean time of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / replays


def copy_bytes_per_us() -> float:
    """Bytes read and written per µs by a copy of 2 GiB."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us([lambda: target.copy_(source)])


def read_bytes_per_us() -> float:
    """Bytes read per µs by a sum over 2 GiB: what reads alone reach."""
    source = torch.randn(2**29, device="cuda")
    return source.nbytes / time_us([source.sum])


def matmul_flops_per_us() -> float:
    """Floating-point operations per µs of a bf16 product of random 8192 × 8192 matrices."""
    size = 8192
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return 2 * size**3 / time_us([lambda: left @ right])
