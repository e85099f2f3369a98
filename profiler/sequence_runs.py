"""Where each sequence of a trace starts, and how long it is: the tokens of one stand together.

Shape suffixes: T tokens, S sequences.
"""

from __future__ import annotations

import numpy as np


def sequence_starts(sequence_T: np.ndarray) -> np.ndarray:
    """Index of every sequence's first token, int64 ``[S]``.

    Args:
        sequence_T: integer ``[T]``, each sequence's tokens together; at least one token.
    """
    return np.concatenate([[0], np.flatnonzero(sequence_T[1:] != sequence_T[:-1]) + 1])


def sequence_runs(sequence_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sequences of a trace, in the order in which they stand.

    Args:
        sequence_T: int32 ``[T]``, each sequence's tokens together; at least one token.

    Returns:
        Ids, int32 ``[S]``, and numbers of tokens, int64 ``[S]``.
    """
    starts_S = sequence_starts(sequence_T)
    return sequence_T[starts_S], np.diff(starts_S, append=len(sequence_T))
