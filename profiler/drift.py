"""Drift: how popularity differs between domains and over time, beside groups put together at random.

Few tokens differ by chance, and tokens of one sequence resemble each other. So the control is not a formula: it puts
as many sequences into each group, chosen at random.

Shape suffixes: T tokens, S sequences, N groups, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profiler.measures import total_variation
from profiler.profile import Drift
from profiler.sequence_runs import sequence_starts
from profiler.trace_format import RoutingTrace

MOST_WINDOWS = 16
SEQUENCES_PER_WINDOW = 4


@dataclass(frozen=True)
class Grouping:
    """Sequences put into groups, and the same number of sequences put into each group at random.

    Attributes:
        names: of the groups (N).
        group_T: int32 ``[T]``, each token's group.
        random_T: int32 ``[T]``, each token's group in the control.
    """

    names: tuple[str, ...]
    group_T: np.ndarray
    random_T: np.ndarray


def sequence_of_tokens(trace: RoutingTrace) -> np.ndarray:
    """Every token's sequence, counted from 0 in the order of the trace, int64 ``[T]``."""
    sequence_T = trace.sequence()
    return np.concatenate([[0], np.cumsum(sequence_T[1:] != sequence_T[:-1])])


def group_sequences(names: Sequence[str], group_S: np.ndarray, sequence_T: np.ndarray, seed: int) -> Grouping:
    """A grouping of whole sequences, with its control.

    Args:
        names: of the groups.
        group_S: int32 ``[S]``, each sequence's group.
        sequence_T: int64 ``[T]``, each token's sequence.
        seed: of the control.
    """
    random_S = np.random.default_rng(seed).permutation(group_S)
    return Grouping(tuple(names), group_S[sequence_T].astype(np.int32), random_S[sequence_T].astype(np.int32))


def time_windows(sequence_T: np.ndarray, seed: int) -> Grouping | None:
    """Windows of about equal token counts in the order of the trace; whole sequences, by where their middle lies.

    Args:
        sequence_T: int64 ``[T]``, each token's sequence.
        seed: of the control.

    Returns:
        The grouping, or None where there are fewer than ``2 * SEQUENCES_PER_WINDOW`` sequences.
    """
    starts = sequence_starts(sequence_T)
    num_windows = min(MOST_WINDOWS, len(starts) // SEQUENCES_PER_WINDOW)
    if num_windows < 2:
        return None
    ends = np.append(starts[1:], len(sequence_T))
    window_S = (starts + ends) // 2 * num_windows // len(sequence_T)
    _, window_S = np.unique(window_S, return_inverse=True)  # a long sequence can leave a window without any
    names = [str(window + 1) for window in range(int(window_S.max()) + 1)]
    return group_sequences(names, window_S, sequence_T, seed) if len(names) > 1 else None


def measure_drift(grouping: Grouping, popularity_NLE: np.ndarray, random_popularity_NLE: np.ndarray) -> Drift:
    """Distances between the groups' popularities.

    Args:
        grouping: what was counted.
        popularity_NLE: int64 ``[N, L, E]``, of the groups.
        random_popularity_NLE: int64 ``[N, L, E]``, of the groups put together at random.
    """
    everything_LE = popularity_NLE.sum(axis=0)
    distance_NN = np.stack([total_variation(group_LE, popularity_NLE).mean(axis=-1) for group_LE in popularity_NLE])
    return Drift(
        names=grouping.names,
        tokens=np.bincount(grouping.group_T, minlength=len(grouping.names)),
        distance=distance_NN,
        to_all=total_variation(popularity_NLE, everything_LE).mean(axis=-1),
        to_all_control=total_variation(random_popularity_NLE, everything_LE).mean(axis=-1),
    )
