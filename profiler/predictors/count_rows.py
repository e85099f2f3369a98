"""Counts of experts by group of tokens, sparse: the table behind paths and token ids.

Shape suffixes: T tokens, K choices, E experts, R groups, M distinct pairs of group and expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.predictors.base import choice_weights
from profiler.predictors.kernels import spread_rows


@dataclass(frozen=True)
class CountRows:
    """Estimated probabilities of experts, one sparse row per group; M is at most T·K, at 6 bytes each.

    Attributes:
        starts: int64 ``[R + 1]``, where each row begins.
        experts: uint16 ``[M]``, ascending within a row.
        shares: float32 ``[M]``, of the group's tokens, those that chose the expert.
    """

    starts: np.ndarray
    experts: np.ndarray
    shares: np.ndarray

    @classmethod
    def count(cls, group_T: np.ndarray, chosen_TK: np.ndarray, num_groups: int, num_experts: int) -> CountRows:
        """Count the experts that each group's tokens chose.

        Args:
            group_T: int64 ``[T]``, below num_groups; every group has a token.
            chosen_TK: ids ``[T, K]``.
            num_groups: R.
            num_experts: E.
        """
        keys = (group_T[:, None] * num_experts + chosen_TK).ravel()
        order = np.argsort(keys)
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        top_k = chosen_TK.shape[1]
        counts = np.add.reduceat(choice_weights(top_k)[order % top_k], first)
        group, expert = np.divmod(keys[first], num_experts)
        tokens_R = np.bincount(group_T, minlength=num_groups)
        return cls(
            np.searchsorted(group, np.arange(num_groups + 1)),
            expert.astype(np.uint16),
            (counts / tokens_R[group]).astype(np.float32),
        )

    def spread(self, scores_TE: np.ndarray, rows_T: np.ndarray) -> None:
        """Write rows, int64 ``[T]``, into scores, float32 ``[T, E]``; where the row is negative, scores stay."""
        spread_rows(scores_TE, rows_T, self.starts, self.experts, self.shares)


def find_keys(sorted_keys: np.ndarray, keys_T: np.ndarray) -> np.ndarray:
    """Where each key stands among sorted, distinct keys: int64 ``[T]``, -1 where it does not."""
    if not len(sorted_keys):
        return np.full(len(keys_T), -1)
    at = np.minimum(np.searchsorted(sorted_keys, keys_T), len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys_T, at, -1)
