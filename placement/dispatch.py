"""The dispatch rules in numpy: which copy of each active expert serves a step.

``level``: one choice per expert, layer and step keeps the number of expert weights read by the busiest GPU low, which
is what a small decode batch waits for. Experts with more than ``split_above_tokens`` tokens are bound by tokens instead
and are split over all their copies.

``nearest``: a token–expert pair whose token lives on a GPU with a copy of the expert is served there and moves nothing.
All other pairs go by ``level``, run on the remaining counts: an expert is active, and is split, by the pairs that are
left of it, in token order, and pairs served at home count neither as tokens nor as load. Where a token lives is the
exchange's matter (``placement.evaluation``); a token without a home (-1; in ``allreduce`` all of them) goes by
``level``.

Shape suffixes: N steps, T tokens, K choices, E experts, C most copies of an expert, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

INACTIVE = -1
SPLIT = -2


def level_dispatch(
    tokens_per_expert: NDArray[np.integer], copies: NDArray[np.integer], num_gpus: int, split_above_tokens: int | None
) -> NDArray[np.int32]:
    """Choose the copy of each active expert for one layer and step.

    Args:
        tokens_per_expert: [E], token–expert pairs of the step.
        copies: [E, C], GPU ids of each expert's copies ascending, padded with -1.
        num_gpus: G.
        split_above_tokens: an expert with more tokens and at least two copies is split; None never splits.

    Returns:
        chosen int32 [E]: GPU id, -1 for an inactive expert, -2 for one split over all its copies.
    """
    tokens = np.asarray(tokens_per_expert)
    holders = _holders(copies)
    chosen = [INACTIVE] * len(holders)
    load = [0] * num_gpus
    active = sorted((len(holders[expert]), int(expert)) for expert in np.flatnonzero(tokens))
    for num_copies, expert in active:
        if split_above_tokens is not None and num_copies > 1 and tokens[expert] > split_above_tokens:
            chosen[expert] = SPLIT
            for gpu in holders[expert]:
                load[gpu] += 1
        else:
            chosen[expert] = min(holders[expert], key=lambda gpu: (load[gpu], gpu))
            load[chosen[expert]] += 1
    _level(chosen, load, holders)
    return np.array(chosen, dtype=np.int32)


def level_dispatch_steps(
    tokens_per_expert: NDArray[np.integer], copies: NDArray[np.integer], num_gpus: int, split_above_tokens: int | None
) -> NDArray[np.int32]:
    """``level_dispatch`` of many independent steps of one layer at once.

    Args:
        tokens_per_expert: [N, E], token–expert pairs per step; the other arguments as for ``level_dispatch``.

    Returns:
        chosen int32 [N, E], row by row equal to ``level_dispatch``.
    """
    from placement.dispatch_kernel import level_steps  # compiles with numba, which reading a plan does not need

    copies_EC = np.ascontiguousarray(copies, dtype=np.int32)
    num_copies_E = (copies_EC >= 0).sum(axis=1)
    order_E = np.lexsort((np.arange(len(copies_EC)), num_copies_E))
    tokens_NE = np.ascontiguousarray(tokens_per_expert, dtype=np.int64)
    split_above = -1 if split_above_tokens is None else split_above_tokens
    chosen_NE: NDArray[np.int32] = level_steps(tokens_NE, copies_EC, num_copies_E, order_E, num_gpus, split_above)
    return chosen_NE


def _holders(copies: NDArray[np.integer]) -> list[tuple[int, ...]]:
    return [tuple(gpu for gpu in row if gpu >= 0) for row in np.asarray(copies).tolist()]


def _level(chosen: list[int], load: list[int], holders: Sequence[tuple[int, ...]]) -> None:
    """Move experts along shortest paths of alternative copies until no overfull GPU can be relieved (in place)."""
    num_gpus = len(load)
    least = math.ceil(sum(load) / num_gpus)
    # Bit masks over experts make an edge test one `and`: placed on u, and with a copy on v.
    placed = [0] * num_gpus
    held = [0] * num_gpus
    for expert, gpu in enumerate(chosen):
        if gpu >= 0:
            placed[gpu] |= 1 << expert
            for holder in holders[expert]:
                held[holder] |= 1 << expert
    while True:
        overfull = sorted((gpu for gpu in range(num_gpus) if load[gpu] > least), key=lambda gpu: (-load[gpu], gpu))
        path = next((path for gpu in overfull if (path := _path_to_relief(gpu, load, placed, held))), None)
        if path is None:
            return
        for source, target in pairwise(path):
            movable = placed[source] & held[target]
            lowest = movable & -movable
            placed[source] ^= lowest
            placed[target] |= lowest
            chosen[lowest.bit_length() - 1] = target
        load[path[0]] -= 1
        load[path[-1]] += 1


def _path_to_relief(start: int, load: list[int], placed: list[int], held: list[int]) -> list[int] | None:
    """Shortest path of GPUs from ``start`` to one with at least two fewer active experts; ties to lower ids."""
    parent = {start: start}
    frontier = [start]
    while frontier:
        reached = []
        for source in frontier:
            for gpu in range(len(load)):
                if gpu not in parent and placed[source] & held[gpu]:
                    parent[gpu] = source
                    reached.append(gpu)
        targets = [gpu for gpu in reached if load[gpu] <= load[start] - 2]
        if targets:
            path = [min(targets)]
            while path[-1] != start:
                path.append(parent[path[-1]])
            return path[::-1]
        frontier = reached
    return None


def dispatch_tokens(
    experts: NDArray[np.integer],
    copies: NDArray[np.integer],
    num_gpus: int,
    split_above_tokens: int | None,
    homes: NDArray[np.integer] | None = None,
) -> NDArray[np.int32]:
    """GPU of every token–expert pair of one layer and step, by ``level`` or, where homes are given, by ``nearest``.

    Args:
        experts: [T, K], the logical experts of each token.
        copies, num_gpus, split_above_tokens: as for ``level_dispatch``.
        homes: [T], the GPU each token lives on or -1; None for the rule ``level``.

    Returns:
        gpus int32 [T, K]. The i-th of a split expert's n pairs, in token order, goes to its copy (i·copies) // n.
    """
    experts, copies = np.asarray(experts), np.asarray(copies)
    homes = np.full(len(experts), -1) if homes is None else np.asarray(homes)
    at_home = ((copies[experts] == homes[:, None, None]) & (homes >= 0)[:, None, None]).any(axis=2).ravel()
    flat = experts.ravel()
    tokens_per_expert = np.bincount(flat[~at_home], minlength=len(copies))
    chosen = level_dispatch(tokens_per_expert, copies, num_gpus, split_above_tokens)
    gpus = np.where(at_home, np.repeat(homes, experts.shape[1]), chosen[flat]).astype(np.int32)
    for expert in np.flatnonzero(chosen == SPLIT):
        pairs = np.flatnonzero((flat == expert) & ~at_home)
        holders = copies[expert][copies[expert] >= 0]
        gpus[pairs] = holders[np.arange(len(pairs)) * len(holders) // len(pairs)]
    return gpus.reshape(experts.shape)
