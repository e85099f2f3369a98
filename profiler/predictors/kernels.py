"""The compiled loops of predicting and scoring: ranking, sums of rows, hits.

Shape suffixes: T tokens, E experts, K choices, N batches, M most popular, R rows of a table, B rows added together.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def top_experts(scores_TE: np.ndarray, count: int) -> np.ndarray:
    """The experts with the highest scores, best first, ties to the lower id: int32 ``[T, count]``, count at most E."""
    num_tokens, num_experts = scores_TE.shape
    best = np.empty((num_tokens, count), np.int32)
    for token in range(num_tokens):
        scores_E, best_K = scores_TE[token], best[token]
        held, least = 0, -np.inf
        for expert in range(num_experts):
            score = scores_E[expert]
            if held == count and score <= least:
                continue
            held = min(held + 1, count)
            place = held - 1
            while place > 0 and scores_E[best_K[place - 1]] < score:
                best_K[place] = best_K[place - 1]
                place -= 1
            best_K[place] = expert
            least = scores_E[best_K[held - 1]]
    return best


@njit(cache=True, nogil=True)
def sum_rows(table_RE: np.ndarray, rows_NB: np.ndarray) -> np.ndarray:
    """Add up rows of a table: float64 ``[N, E]``, sum over b of table[rows[n, b]]."""
    num_sums, num_rows = rows_NB.shape
    sums = np.zeros((num_sums, table_RE.shape[1]), np.float64)
    for at in range(num_sums):
        for place in range(num_rows):
            row = rows_NB[at, place]
            for expert in range(table_RE.shape[1]):
                sums[at, expert] += table_RE[row, expert]
    return sums


@njit(cache=True, nogil=True)
def spread_rows(
    scores_TE: np.ndarray, rows_T: np.ndarray, starts_R: np.ndarray, experts: np.ndarray, values: np.ndarray
) -> None:
    """Write sparse rows into dense ones; a token whose row is negative keeps what it has."""
    for token in range(len(rows_T)):
        row = rows_T[token]
        if row >= 0:
            scores_TE[token] = 0
            for at in range(starts_R[row], starts_R[row + 1]):
                scores_TE[token, experts[at]] = values[at]


@njit(cache=True, nogil=True)
def count_hits(chosen_TK: np.ndarray, predicted_TK: np.ndarray) -> np.ndarray:
    """Hits at every k: int64 ``[K]``, how many of the tokens' first k choices are among the first k predicted."""
    num_tokens, top_k = chosen_TK.shape
    hits = np.zeros(top_k, np.int64)
    for token in range(num_tokens):
        for place in range(top_k):
            for guess in range(top_k):
                if chosen_TK[token, place] == predicted_TK[token, guess]:
                    hits[max(place, guess)] += 1
    return np.cumsum(hits)


@njit(cache=True, nogil=True)
def count_popular_hits(popularity_NE: np.ndarray, estimated_NM: np.ndarray) -> np.ndarray:
    """How many of a batch's M most popular experts were estimated to be: int64 ``[N]``.

    Among experts that are equally popular in truth, those that were estimated are taken to be the more popular ones.
    """
    num_batches, num_popular = estimated_NM.shape
    hits = np.zeros(num_batches, np.int64)
    for batch in range(num_batches):
        popularity_E = popularity_NE[batch]
        threshold = np.sort(popularity_E)[-num_popular]
        places_for_equals = num_popular - (popularity_E > threshold).sum()
        equals = 0
        for expert in estimated_NM[batch]:
            if popularity_E[expert] > threshold:
                hits[batch] += 1
            elif popularity_E[expert] == threshold:
                equals += 1
        hits[batch] += min(equals, places_for_equals)
    return hits
