"""Exact locality by dynamic programming over the chain of layers, for few experts.

A state is one way to put a layer's experts on GPUs. Between two layers the transitions kept are a bilinear form of
their states, so a step of the program is a matrix product followed by a maximum.

Shape suffixes: S states, E experts, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 20_000
#: Multiplications that take some ten seconds on one core.
MOST_WORK = 2e11
TARGETS_AT_ONCE = 512


def is_small(num_layers: int, sizes: Sequence[int]) -> bool:
    """Whether the program is quick enough for layers with this number of experts on each GPU."""
    states = count_states(sizes)
    return states <= MOST_STATES and (num_layers - 1) * states**2 * len(sizes) * sum(sizes) <= MOST_WORK


def count_states(sizes: Sequence[int]) -> int:
    """Ways to put sum(sizes) experts on GPUs that hold these numbers of them."""
    states = math.factorial(sum(sizes))
    for size in sizes:
        states //= math.factorial(size)
    return states


def best_chain(
    transitions: NDArray[np.integer],
    loads: NDArray[np.integer],
    sizes: Sequence[int],
    load_limits: NDArray[np.float64] | None,
) -> NDArray[np.intp]:
    """The placement that keeps most transitions, proven.

    Args:
        transitions: [L-1, E, E].
        loads: [L, E].
        sizes: experts on each GPU.
        load_limits: [L], the most load of a GPU in each layer, or None; some state must keep to them.

    Returns:
        GPU of every expert, intp [L, E].
    """
    states = _states(sizes)
    held = states[:, None, :] == np.arange(len(sizes))[None, :, None]  # [S, G, E]
    # Counts below 2^24 are exact in float32, which is twice as fast.
    dtype = np.float32 if transitions.sum() < 2**24 else np.float64
    allowed = []
    for layer, load in enumerate(loads):
        per_gpu = held @ load.astype(np.float64)
        limit = np.inf if load_limits is None else load_limits[layer]
        allowed.append(np.flatnonzero((per_gpu <= limit).all(axis=1)))
    best: NDArray[Any] = np.zeros(len(allowed[0]), dtype=dtype)
    came_from = []
    for layer, counts in enumerate(transitions):
        sources = np.matmul(held[allowed[layer]].astype(dtype), counts.astype(dtype)).reshape(len(best), -1)
        targets = held[allowed[layer + 1]].reshape(len(allowed[layer + 1]), -1)
        best, origin = _advance(best, sources, targets)
        came_from.append(origin)
    index = int(np.argmax(best))
    path = [allowed[-1][index]]
    for layer in range(len(came_from) - 1, -1, -1):
        index = int(came_from[layer][index])
        path.append(allowed[layer][index])
    return states[path[::-1]]


def _advance(
    best: NDArray[Any], sources: NDArray[Any], targets: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Best value of every state of the next layer, and the state it comes from."""
    values = np.empty(len(targets), dtype=best.dtype)
    origin = np.empty(len(targets), dtype=np.intp)
    for start in range(0, len(targets), TARGETS_AT_ONCE):
        part = slice(start, start + TARGETS_AT_ONCE)
        scores = targets[part].astype(best.dtype) @ sources.T
        scores += best
        origin[part] = scores.argmax(axis=1)
        values[part] = scores[np.arange(len(scores)), origin[part]]
    return values, origin


def _states(sizes: Sequence[int]) -> NDArray[np.intp]:
    """All states: GPU of every expert, [S, E]."""
    partial: list[tuple[tuple[int, ...], list[int]]] = [(tuple(range(sum(sizes))), [0] * sum(sizes))]
    for gpu, size in enumerate(sizes):
        extended = []
        for free, gpus in partial:
            for chosen in combinations(free, size):
                taken = list(gpus)
                for expert in chosen:
                    taken[expert] = gpu
                extended.append((tuple(expert for expert in free if expert not in chosen), taken))
        partial = extended
    return np.array([gpus for _, gpus in partial], dtype=np.intp)
