"""Exact locality by dynamic programming over the chain of layers, for few experts.

A state is one way to put a layer's experts on GPUs. Between two layers the transitions kept are a bilinear form of
their states, so a step of the program is a matrix product followed by a maximum. GPUs of equal size can be renamed: a
state's best value is that of its class, so targets are one state per class only, named in the order of the experts.

Shape suffixes: S states, C classes of states, E experts, G GPUs.
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
TARGETS_AT_ONCE = 128


def is_small(num_layers: int, sizes: Sequence[int]) -> bool:
    """Whether the program is quick enough for layers with this number of experts on each GPU."""
    states = count_states(sizes)
    classes = states // math.prod(math.factorial(sizes.count(size)) for size in set(sizes) if size)
    return states <= MOST_STATES and (num_layers - 1) * states * classes * len(sizes) * sum(sizes) <= MOST_WORK


def count_states(sizes: Sequence[int]) -> int:
    """Ways to put sum(sizes) experts on GPUs that hold these numbers of them."""
    states = math.factorial(sum(sizes))
    for size in sizes:
        states //= math.factorial(size)
    return states


def best_chain(
    transitions: NDArray[np.number[Any]],
    loads: NDArray[np.number[Any]],
    sizes: Sequence[int],
    load_limits: NDArray[np.float64] | None,
) -> NDArray[np.int64]:
    """The placement that keeps most transitions, proven.

    Args:
        transitions: [L-1, E, E], whole numbers.
        loads: [L, E].
        sizes: experts on each GPU.
        load_limits: [L], the most load of a GPU in each layer, or None; some state must keep to them.

    Returns:
        GPU of every expert, int64 [L, E].
    """
    states = _states(sizes)
    held = states[:, None, :] == np.arange(len(sizes))[None, :, None]  # [S, G, E]
    named, class_of = np.unique(_rename(states, sizes), axis=0, return_inverse=True)  # [C, E], [S]
    class_of = class_of.reshape(-1)
    held_named = named[:, None, :] == np.arange(len(sizes))[None, :, None]
    # Counts below 2^24 are exact in float32, which is twice as fast.
    dtype = np.float32 if transitions.sum() < 2**24 else np.float64
    limits = np.full(len(loads), np.inf) if load_limits is None else load_limits
    fits = [(held_named @ load <= limit).all(axis=1) for load, limit in zip(loads, limits, strict=True)]
    best: NDArray[Any] = np.where(fits[0], 0, -np.inf).astype(dtype)  # [C]
    came_from = []
    for counts, fit in zip(transitions, fits[1:], strict=True):
        # All states before, each with its class's value, against one state of every class after.
        sources = np.matmul(held.astype(dtype), counts.astype(dtype)).reshape(len(states), -1)
        best, origin = _advance(best[class_of], sources, held_named.reshape(len(named), -1))
        best[~fit] = -np.inf
        came_from.append(origin)
    state = named[int(np.argmax(best))]
    index = int(np.argmax(best))
    path = [state]
    rename = np.arange(len(sizes))  # from the names that the program used for a layer to those of the path
    for origin in reversed(came_from):
        source = int(origin[index])
        index = int(class_of[source])
        path.append(rename[states[source]])
        rename = rename[_renaming(named[index], states[source], len(sizes))]
    return np.stack(path[::-1])


def _rename(states: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.int64]:
    """States [S, E] with GPUs of equal size named in the order in which experts use them."""
    renamed = np.empty_like(states)
    for size in set(sizes):
        gpus = np.flatnonzero(np.asarray(sizes) == size)
        if not size:
            continue
        firsts = np.stack([(states == gpu).argmax(axis=1) for gpu in gpus], axis=1)  # first expert on each GPU, [S, n]
        ranks = firsts.argsort(axis=1).argsort(axis=1)
        for column, gpu in enumerate(gpus):
            rows, experts = np.nonzero(states == gpu)
            renamed[rows, experts] = gpus[ranks[rows, column]]
    return renamed


def _renaming(before: NDArray[np.int64], after: NDArray[np.int64], num_gpus: int) -> NDArray[np.int64]:
    """New name of every GPU, where two states differ by names alone."""
    names = np.arange(num_gpus)
    names[before] = after
    return names


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


def _states(sizes: Sequence[int]) -> NDArray[np.int64]:
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
    return np.array([gpus for _, gpus in partial], dtype=np.int64)
