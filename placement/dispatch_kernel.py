"""The dispatch rule ``level`` compiled, for many steps of one layer; ``placement.dispatch`` holds the readable form.

Shape suffixes: N steps, E experts, C most copies of an expert, G GPUs.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

INACTIVE = -1
SPLIT = -2


@njit(cache=True, nogil=True)
def level_steps(
    tokens_NE: NDArray[np.int64],
    copies_EC: NDArray[np.int32],
    num_copies_E: NDArray[np.int64],
    order_E: NDArray[np.int64],
    num_gpus: int,
    split_above: int,
) -> NDArray[np.int32]:
    """Choice of every step, int32 [N, E]: GPU id, -1 inactive, -2 split.

    Args:
        tokens_NE: int64 [N, E], token–expert pairs per step.
        copies_EC: int32 [E, C], GPUs of each expert's copies ascending, padded with -1.
        num_copies_E: int64 [E], how many of them are no padding.
        order_E: int64 [E], experts in the order in which they choose: number of copies, then id.
        num_gpus: G.
        split_above: an expert with more tokens and at least two copies is split; -1 never splits.
    """
    num_steps, num_experts = tokens_NE.shape
    chosen_NE = np.full((num_steps, num_experts), INACTIVE, dtype=np.int32)
    # Experts that each GPU serves and another could, in any order.
    placed_GE = np.empty((num_gpus, num_experts), dtype=np.int32)
    load_G, num_placed_G, parent_G, queue_G = np.empty((4, num_gpus), dtype=np.int64)
    stuck_G = np.empty(num_gpus, dtype=np.bool_)
    for step in range(num_steps):
        stuck_G[:] = False
        total = _choose_first(
            tokens_NE[step],
            copies_EC,
            num_copies_E,
            order_E,
            split_above,
            chosen_NE[step],
            load_G,
            placed_GE,
            num_placed_G,
        )
        least = (total + num_gpus - 1) // num_gpus
        source = _fullest(load_G, stuck_G, least)
        while source >= 0:
            target = _find_relief(source, load_G, placed_GE, num_placed_G, copies_EC, num_copies_E, parent_G, queue_G)
            if target < 0:
                # What it reaches is reached by no fuller GPU and changed by no later move: it stays stuck.
                stuck_G[source] = True
            else:
                load_G[source] -= 1
                load_G[target] += 1
                _move(source, target, chosen_NE[step], placed_GE, num_placed_G, copies_EC, num_copies_E, parent_G)
            source = _fullest(load_G, stuck_G, least)
    return chosen_NE


@njit(cache=True, nogil=True)
def _choose_first(
    tokens_E: NDArray[np.int64],
    copies_EC: NDArray[np.int32],
    num_copies_E: NDArray[np.int64],
    order_E: NDArray[np.int64],
    split_above: int,
    chosen_E: NDArray[np.int32],
    load_G: NDArray[np.int64],
    placed_GE: NDArray[np.int32],
    num_placed_G: NDArray[np.int64],
) -> int:
    """Each expert in turn to its copy with the fewest active experts so far; returns the sum of active experts."""
    load_G[:] = 0
    num_placed_G[:] = 0
    total = 0
    for expert in order_E:
        tokens, copies = tokens_E[expert], num_copies_E[expert]
        if tokens == 0:
            continue
        if split_above >= 0 and copies > 1 and tokens > split_above:
            chosen_E[expert] = SPLIT
            for gpu in copies_EC[expert, :copies]:
                load_G[gpu] += 1
            total += copies
            continue
        best = copies_EC[expert, 0]
        for gpu in copies_EC[expert, 1:copies]:
            if load_G[gpu] < load_G[best]:
                best = gpu
        chosen_E[expert] = best
        load_G[best] += 1
        total += 1
        if copies > 1:
            placed_GE[best, num_placed_G[best]] = expert
            num_placed_G[best] += 1
    return total


@njit(cache=True, nogil=True)
def _fullest(load_G: NDArray[np.int64], stuck_G: NDArray[np.bool_], least: int) -> int:
    """The GPU with most active experts above ``least`` that is not stuck (ties: lower id), or -1."""
    fullest = -1
    for gpu in range(len(load_G)):
        if load_G[gpu] > least and not stuck_G[gpu] and (fullest < 0 or load_G[gpu] > load_G[fullest]):
            fullest = gpu
    return fullest


@njit(cache=True, nogil=True)
def _find_relief(
    source: int,
    load_G: NDArray[np.int64],
    placed_GE: NDArray[np.int32],
    num_placed_G: NDArray[np.int64],
    copies_EC: NDArray[np.int32],
    num_copies_E: NDArray[np.int64],
    parent_G: NDArray[np.int64],
    queue_G: NDArray[np.int64],
) -> int:
    """Nearest GPU with at least two fewer active experts (ties: lower id), or -1; ``parent_G`` then holds the path."""
    parent_G[:] = -1
    parent_G[source] = source
    queue_G[0] = source
    begin, end = 0, 1
    while begin < end:
        best = -1
        frontier_end = end
        for position in range(begin, frontier_end):
            gpu = queue_G[position]
            first = end
            for expert in placed_GE[gpu, : num_placed_G[gpu]]:
                for neighbour in copies_EC[expert, : num_copies_E[expert]]:
                    if parent_G[neighbour] >= 0:
                        continue
                    parent_G[neighbour] = gpu
                    place = end  # neighbours of one GPU wait in the order of their ids
                    while place > first and queue_G[place - 1] > neighbour:
                        queue_G[place] = queue_G[place - 1]
                        place -= 1
                    queue_G[place] = neighbour
                    end += 1
                    if load_G[neighbour] <= load_G[source] - 2 and (best < 0 or neighbour < best):
                        best = neighbour
        if best >= 0:
            return best
        begin = frontier_end
    return -1


@njit(cache=True, nogil=True)
def _move(
    source: int,
    target: int,
    chosen_E: NDArray[np.int32],
    placed_GE: NDArray[np.int32],
    num_placed_G: NDArray[np.int64],
    copies_EC: NDArray[np.int32],
    num_copies_E: NDArray[np.int64],
    parent_G: NDArray[np.int64],
) -> None:
    """Move, along every edge of the path, the lowest expert that the next GPU could serve as well.

    From the end: on a shortest path no expert could go two edges, so the order of the moves does not matter.
    """
    gpu = target
    while gpu != source:
        before = parent_G[gpu]
        lowest, place = len(chosen_E), -1
        for index in range(num_placed_G[before]):
            expert = placed_GE[before, index]
            if expert < lowest:
                for holder in copies_EC[expert, : num_copies_E[expert]]:
                    if holder == gpu:
                        lowest, place = expert, index
        num_placed_G[before] -= 1
        placed_GE[before, place] = placed_GE[before, num_placed_G[before]]
        placed_GE[gpu, num_placed_G[gpu]] = lowest
        num_placed_G[gpu] += 1
        chosen_E[lowest] = gpu
        gpu = before
