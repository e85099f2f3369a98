"""The inner loops of counting, compiled: experts and pairs of experts, token by token, for some layers of a chunk.

Every function adds to tables that the caller owns and releases the GIL, so that threads can share the layers out.

Shape suffixes: T tokens of a chunk, L layers, E experts, K choices, N groups of tokens.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

#: Tokens are taken in blocks that fit the processor's second-level cache together with a layer's tables.
TOKENS_PER_BLOCK = 1024


@njit(cache=True, nogil=True)
def count_experts(
    experts_TLK: NDArray[np.unsignedinteger],
    group_T: NDArray[np.int32],
    first_layer: int,
    last_layer: int,
    popularity_NLE: NDArray[np.int64],
) -> None:
    """Count every choice of layers ``first_layer`` to ``last_layer`` (excluded), by the token's group.

    Args:
        experts_TLK: uint8 or uint16 ``[T, L, K]``.
        group_T: int32 ``[T]``, below N; negative: the token is not counted.
        first_layer, last_layer: which layers.
        popularity_NLE: int64 ``[N, L, E]``, added to.
    """
    num_tokens, _, num_choices = experts_TLK.shape
    for start in range(0, num_tokens, TOKENS_PER_BLOCK):
        stop = min(start + TOKENS_PER_BLOCK, num_tokens)
        for layer in range(first_layer, last_layer):
            for token in range(start, stop):
                group = group_T[token]
                if group >= 0:
                    for choice in range(num_choices):
                        popularity_NLE[group, layer, experts_TLK[token, layer, choice]] += 1


@njit(cache=True, nogil=True)
def count_layer_pairs(
    experts_TLK: NDArray[np.unsignedinteger],
    group_T: NDArray[np.int32],
    first_layer: int,
    last_layer: int,
    affinity_NLEE: NDArray[np.int64],
    top1_affinity_NLEE: NDArray[np.int64],
) -> None:
    """Count pairs of an expert chosen at a layer and one chosen at the next, for layers first to last (excluded).

    Args:
        experts_TLK: uint8 or uint16 ``[T, L, K]``.
        group_T: int32 ``[T]``, below N; negative: the token is not counted.
        first_layer, last_layer: which layers, at most up to L - 1.
        affinity_NLEE: int64 ``[N, L-1, E, E]``, added to: all K x K pairs.
        top1_affinity_NLEE: int64 ``[N, L-1, E, E]``, added to: first choices.
    """
    num_tokens, _, num_choices = experts_TLK.shape
    for start in range(0, num_tokens, TOKENS_PER_BLOCK):
        stop = min(start + TOKENS_PER_BLOCK, num_tokens)
        for layer in range(first_layer, last_layer):
            for token in range(start, stop):
                group = group_T[token]
                if group < 0:
                    continue
                here, there = experts_TLK[token, layer, 0], experts_TLK[token, layer + 1, 0]
                top1_affinity_NLEE[group, layer, here, there] += 1
                for first in range(num_choices):
                    row_E = affinity_NLEE[group, layer, experts_TLK[token, layer, first]]
                    for second in range(num_choices):
                        row_E[experts_TLK[token, layer + 1, second]] += 1


@njit(cache=True, nogil=True)
def count_coactivations(
    experts_TLK: NDArray[np.unsignedinteger],
    group_T: NDArray[np.int32],
    first_layer: int,
    last_layer: int,
    top1_NLE: NDArray[np.int64],
    later_NLEE: NDArray[np.int64],
) -> None:
    """Count first choices, and pairs chosen by one token, each once: row the earlier choice, column the later one.

    Args:
        experts_TLK: uint8 or uint16 ``[T, L, K]``.
        group_T: int32 ``[T]``, below N; negative: the token is not counted.
        first_layer, last_layer: which layers.
        top1_NLE: int64 ``[N, L, E]``, added to.
        later_NLEE: int64 ``[N, L, E, E]``, added to.
    """
    num_tokens, _, num_choices = experts_TLK.shape
    for start in range(0, num_tokens, TOKENS_PER_BLOCK):
        stop = min(start + TOKENS_PER_BLOCK, num_tokens)
        for layer in range(first_layer, last_layer):
            for token in range(start, stop):
                group = group_T[token]
                if group < 0:
                    continue
                top1_NLE[group, layer, experts_TLK[token, layer, 0]] += 1
                for first in range(num_choices - 1):
                    row_E = later_NLEE[group, layer, experts_TLK[token, layer, first]]
                    for second in range(first + 1, num_choices):
                        row_E[experts_TLK[token, layer, second]] += 1
