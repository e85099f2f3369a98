"""Convergence: how many tokens it takes until the affinity between layers is stable.

Source: ExFlow, which reports that 1,000 to 3,000 tokens suffice.

Shape suffixes: T tokens, L layers, E experts.
"""

from __future__ import annotations

import numpy as np

from profiler.count_kernel import count_layer_pairs
from profiler.measures import total_variation
from profiler.profile import Convergence
from profiler.sequence_runs import sequence_starts
from profiler.trace_format import RoutingTrace

FIRST_TOKENS = 125
MOST_TOKENS = 128_000
#: An affinity is called stable where its distance is within this of what remains at the end.
TOLERANCE = 0.05


def measure_convergence(
    trace: RoutingTrace, sequence_T: np.ndarray, affinity_LEE: np.ndarray, seed: int = 0
) -> Convergence | None:
    """Compare the affinity of a growing sample with that of all tokens outside it.

    The sample grows by whole sequences in a random order, as traffic does; its last sequence is cut.

    Args:
        trace: an open trace with two layers or more.
        sequence_T: int64 ``[T]``, each token's sequence, counted from 0.
        affinity_LEE: int64 ``[L-1, E, E]``, counted over all tokens.
        seed: of the order.

    Returns:
        None where there are fewer than ``2 * FIRST_TOKENS`` tokens.
    """
    most = min(trace.num_tokens // 2, MOST_TOKENS)
    if most < FIRST_TOKENS:
        return None
    sizes = [FIRST_TOKENS * 2**n for n in range(most.bit_length()) if FIRST_TOKENS * 2**n <= most]
    experts_TLK = trace.gather_experts(_sample_tokens(sequence_T, sizes[-1], seed))
    sampled_NLEE, unused_NLEE = (np.zeros((1, *affinity_LEE.shape), np.int64) for _ in range(2))
    distances = []
    for start, stop in zip([0, *sizes[:-1]], sizes, strict=True):
        group_T = np.zeros(stop - start, np.int32)
        count_layer_pairs(experts_TLK[start:stop], group_T, 0, trace.num_layers - 1, sampled_NLEE, unused_NLEE)
        distances.append(_affinity_distance(sampled_NLEE[0], affinity_LEE - sampled_NLEE[0]))
    within = np.flatnonzero(np.array(distances) <= distances[-1] + TOLERANCE)
    return Convergence(np.array(sizes), np.array(distances), distances[-1], sizes[int(within[0])])


def _sample_tokens(sequence_T: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """The first tokens, int64 ``[num_tokens]``, of the sequences in a random order."""
    starts = sequence_starts(sequence_T)
    ends = np.append(starts[1:], len(sequence_T))
    order_S = np.random.default_rng(seed).permutation(len(starts))
    needed = int(np.searchsorted(np.cumsum((ends - starts)[order_S]), num_tokens)) + 1
    return np.concatenate([np.arange(starts[s], ends[s]) for s in order_S[:needed]])[:num_tokens]


def _affinity_distance(sampled_LEE: np.ndarray, others_LEE: np.ndarray) -> float:
    """Total variation of P(next | expert), weighted by the others' popularity, mean over layers.

    An expert that the sample never saw counts as wholly different.
    """
    distance_LE = total_variation(sampled_LEE, others_LEE)
    distance_LE[sampled_LEE.sum(axis=-1) == 0] = 1.0
    weight_LE = others_LEE.sum(axis=-1, dtype=np.float64)
    return float(((distance_LE * weight_LE).sum(axis=-1) / weight_LE.sum(axis=-1)).mean())
