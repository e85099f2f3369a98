"""Tables of counts that grow chunk by chunk; the layers of a chunk are shared out among threads.

Shape suffixes: T tokens of a chunk, L layers, E experts, K choices, N groups of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from profiler.count_kernel import count_coactivations, count_experts, count_layer_pairs
from profiler.errors import TraceError
from profiler.trace_format import RoutingTrace

#: What the tables of one pass may take.
MOST_TABLE_BYTES = 2 << 30


class PopularityCounts:
    """How many tokens of each group chose each expert.

    Attributes:
        popularity_NLE: int64 ``[N, L, E]``.

    Raises:
        TraceError: the table would not fit the memory.
    """

    def __init__(self, trace: RoutingTrace, num_groups: int) -> None:
        shape = (num_groups, trace.num_layers, trace.num_experts)
        _check_size(trace, num_groups, 8 * int(np.prod(shape)))
        self.popularity_NLE = np.zeros(shape, np.int64)

    def add(self, experts_TLK: np.ndarray, group_T: np.ndarray) -> None:
        """Count the tokens of a chunk; those of a negative group are left out."""
        table_NLE = self.popularity_NLE
        over_layers(table_NLE.shape[1], lambda first, last: count_experts(experts_TLK, group_T, first, last, table_NLE))


class GroupedCounts:
    """Experts and pairs of experts, for each group of tokens.

    Attributes:
        popularity_NLE: int64 ``[N, L, E]``, tokens that chose the expert.
        top1_NLE: int64 ``[N, L, E]``, tokens whose first choice it was.
        affinity_NLEE: int64 ``[N, L-1, E, E]``, pairs of a choice and a choice at the next layer.
        top1_affinity_NLEE: int64 ``[N, L-1, E, E]``, the same for first choices.

    Raises:
        TraceError: the tables would not fit the memory.
    """

    def __init__(self, trace: RoutingTrace, num_groups: int) -> None:
        num_layers, num_experts = trace.num_layers, trace.num_experts
        _check_size(trace, num_groups, 8 * num_groups * (3 * num_layers - 2) * num_experts**2)
        self.popularity_NLE = np.zeros((num_groups, num_layers, num_experts), np.int64)
        self.top1_NLE = np.zeros_like(self.popularity_NLE)
        self.affinity_NLEE = np.zeros((num_groups, num_layers - 1, num_experts, num_experts), np.int64)
        self.top1_affinity_NLEE = np.zeros_like(self.affinity_NLEE)
        self._later_NLEE = np.zeros((num_groups, num_layers, num_experts, num_experts), np.int64)

    def add(self, experts_TLK: np.ndarray, group_T: np.ndarray) -> None:
        """Count the tokens of a chunk; those of a negative group are left out."""
        num_layers = self.popularity_NLE.shape[1]

        def count(first: int, last: int) -> None:
            count_experts(experts_TLK, group_T, first, last, self.popularity_NLE)
            count_coactivations(experts_TLK, group_T, first, last, self.top1_NLE, self._later_NLEE)
            pairs = (self.affinity_NLEE, self.top1_affinity_NLEE)
            count_layer_pairs(experts_TLK, group_T, first, min(last, num_layers - 1), *pairs)

        over_layers(num_layers, count)

    def coactivation(self, group: int) -> np.ndarray:
        """Tokens of a group that chose both experts, int64 ``[L, E, E]``; the diagonal equals popularity."""
        later_LEE = self._later_NLEE[group]
        both_LEE = later_LEE + later_LEE.swapaxes(1, 2)
        diagonal = np.arange(both_LEE.shape[1])
        both_LEE[:, diagonal, diagonal] = self.popularity_NLE[group]
        return both_LEE


def _check_size(trace: RoutingTrace, num_groups: int, num_bytes: int) -> None:
    if num_groups > 1 and num_bytes > MOST_TABLE_BYTES:
        raise TraceError(
            f"{trace.path}: the tables of {trace.num_layers} layers of {trace.num_experts} experts for {num_groups} "
            f"groups (domains, even and odd sequences) would take {num_bytes / 2**30:.1f} GiB, expected at most "
            f"{MOST_TABLE_BYTES / 2**30:.0f} GiB; name fewer domains, or split the trace by domain"
        )


def over_layers(num_layers: int, count: Callable[[int, int], None]) -> None:
    """Call ``count(first, last)`` for ranges of layers that make up all, on one thread per available core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_ranges = min(cores, num_layers)
    if num_ranges <= 1:
        count(0, num_layers)
        return
    edges = np.linspace(0, num_layers, num_ranges + 1).astype(int).tolist()
    with ThreadPoolExecutor(num_ranges) as pool:
        list(pool.map(count, edges[:-1], edges[1:]))
