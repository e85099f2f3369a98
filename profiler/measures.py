"""Measures on counts: how uneven, how different, how informative, how many at once.

Shape suffixes: L layers, E experts, B batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts as shares of their last dimension's sum, float64 of the same shape; zeros where nothing was counted."""
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)


def popularity_skew(popularity: np.ndarray) -> np.ndarray:
    """How much more than the mean expert the busiest one gets.

    Args:
        popularity: ``[L, E]``, counts.

    Returns:
        float64 ``[L]``, busiest expert / mean expert, at least 1; 0 where nothing was counted.
    """
    return shares(popularity).max(axis=-1) * popularity.shape[-1]


def gini(popularity: np.ndarray) -> np.ndarray:
    """Gini coefficient of the experts' counts: 0 where all are equal, (E - 1) / E where one expert gets everything.

    Args:
        popularity: ``[L, E]``, counts.

    Returns:
        float64 ``[L]``; 0 where nothing was counted.
    """
    num_experts = popularity.shape[-1]
    rising_LE = np.sort(shares(popularity), axis=-1)
    weights_E = (2 * np.arange(1, num_experts + 1) - num_experts - 1) / num_experts
    return np.maximum(rising_LE @ weights_E, 0.0)


def entropy_bits(popularity: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares, float64 ``[L]``, at most log2(E); 0 where nothing was counted."""
    share_LE = shares(popularity)
    logs_LE = np.log2(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return 0.0 - (share_LE * logs_LE).sum(axis=-1)  # not minus zero


def mutual_information(counts: np.ndarray) -> float:
    """Mutual information of the two experts of a pair, I(A; B).

    Args:
        counts: ``[E, E']``, how often each pair was seen; at least one.

    Returns:
        Bits.
    """
    joint = counts / counts.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def total_variation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Share of the choices that would have to change to turn one into the other.

    Args:
        first, second: counts ``[…, E]``; dimensions before the last broadcast.

    Returns:
        float64 ``[…]``, 0 (equal) to 1 (disjoint); 0.5 where just one of them counted nothing.
    """
    return np.abs(shares(first) - shares(second)).sum(axis=-1) / 2


def expected_active(popularity: np.ndarray, num_tokens: int, batch_sizes: Sequence[int]) -> np.ndarray:
    """Expected distinct experts of B tokens that are drawn independently, with replacement, from those counted.

    An expert that a share p of the tokens chose is missed by all B of them with probability (1 - p)^B: exact,
    however the choices of one token depend on each other.

    Args:
        popularity: ``[L, E]``, tokens that chose the expert.
        num_tokens: tokens counted, at least 1.
        batch_sizes: B.

    Returns:
        float64 ``[B, L]``.
    """
    missed_LE = 1.0 - popularity / num_tokens
    return np.stack([(1.0 - missed_LE**batch).sum(axis=-1) for batch in batch_sizes])
