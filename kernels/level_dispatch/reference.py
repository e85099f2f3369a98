"""Plain-torch reference of the dispatch rules `level` and `nearest` (integer arithmetic, the same on every rank).

`level`: per layer and step each active expert is served by one of its copies, chosen so that the busiest GPU has as few
active experts as possible: small decode batches wait for expert weights to be read, not for tokens.

`nearest`: a pair whose token lives on a GPU with a copy of the expert is served there; all other pairs go by `level`,
which sees their counts alone.
"""

from __future__ import annotations

import itertools
from collections import deque

import torch

from kernels.level_dispatch.table import DispatchTable

INACTIVE = -1
SPLIT = -2


def level_dispatch(
    tokens_per_expert: torch.Tensor, copies: torch.Tensor, num_gpus: int, split_above_tokens: int | None
) -> torch.Tensor:
    """Choose one copy for every active expert, or all of them for an expert with very many tokens.

    Args:
        tokens_per_expert: token–expert pairs of this step, int64 ``[E]``.
        copies: GPUs that hold a copy of each expert, int64 ``[E, C]``, ascending, padded with -1.
        num_gpus: number of GPUs.
        split_above_tokens: experts with more pairs and at least two copies are split; None never splits.

    Returns:
        int64 ``[E]`` on the CPU: the GPU that serves the expert, -1 where it has no tokens, -2 where it is split.
    """
    counts: list[int] = tokens_per_expert.tolist()
    holders = [[gpu for gpu in row if gpu >= 0] for row in copies.tolist()]
    load = [0] * num_gpus
    chosen = [INACTIVE] * len(counts)
    active = [expert for expert, count in enumerate(counts) if count > 0]
    for expert in sorted(active, key=lambda e: (len(holders[e]), e)):
        gpus = holders[expert]
        if split_above_tokens is not None and len(gpus) > 1 and counts[expert] > split_above_tokens:
            chosen[expert] = SPLIT
            for gpu in gpus:
                load[gpu] += 1
        else:
            chosen[expert] = min(gpus, key=lambda g: (load[g], g))
            load[chosen[expert]] += 1
    _level(chosen, holders, load)
    return torch.tensor(chosen, dtype=torch.int64)


def _level(chosen: list[int], holders: list[list[int]], load: list[int]) -> None:
    """Move experts along shortest paths of alternative copies while that lowers a GPU above the least possible."""
    num_gpus = len(load)
    least = -(-sum(load) // num_gpus)
    placed: list[list[int]] = [[] for _ in range(num_gpus)]
    for expert, gpu in enumerate(chosen):  # ascending ids, so each list stays sorted
        if gpu >= 0:
            placed[gpu].append(expert)
    moved = True
    while moved:
        moved = False
        for source in sorted((g for g in range(num_gpus) if load[g] > least), key=lambda g: (-load[g], g)):
            path = _shortest_path(source, placed, holders, load)
            if path:
                for start, end in itertools.pairwise(path):
                    expert = next(e for e in placed[start] if end in holders[e])
                    placed[start].remove(expert)
                    placed[end] = sorted([*placed[end], expert])
                    chosen[expert] = end
                load[path[0]] -= 1
                load[path[-1]] += 1
                moved = True
                break


def _shortest_path(source: int, placed: list[list[int]], holders: list[list[int]], load: list[int]) -> list[int]:
    """GPUs from ``source`` to the nearest GPU with at least two fewer active experts; empty where none is reached."""
    parent: dict[int, int] = {source: source}
    level = deque([source])
    while level:
        following: deque[int] = deque()
        reached: list[int] = []
        for gpu in level:
            for neighbour in sorted({g for expert in placed[gpu] for g in holders[expert]}):
                if neighbour not in parent:
                    parent[neighbour] = gpu
                    following.append(neighbour)
                    if load[neighbour] <= load[source] - 2:
                        reached.append(neighbour)
        if reached:
            path = [min(reached)]
            while path[-1] != source:
                path.append(parent[path[-1]])
            return path[::-1]
        level = following
    return []


def pairs_at_home(experts: torch.Tensor, copies: torch.Tensor, homes: torch.Tensor) -> torch.Tensor:
    """Which pairs the rule `nearest` serves where their token lives, bool ``[T, K]``.

    Args:
        experts: logical expert ids, int64 ``[T, K]``.
        copies: int64 ``[E, C]``, ascending, padded with -1.
        homes: GPU of each token, integer ``[T]``, or -1 for none.
    """
    holds_home = (copies[experts] == homes[:, None, None]).any(dim=2)
    return holds_home & (homes >= 0)[:, None]


def split_pairs(experts: torch.Tensor, gpus: torch.Tensor, chosen: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """Spread the pairs of split experts over their copies in contiguous equal runs, in token order.

    Args:
        experts: logical expert ids, int64 ``[T, K]``.
        gpus: the chosen GPU of every pair, int64 ``[T, K]``, -2 for the pairs to spread.
        chosen: what `level_dispatch` returned, int64 ``[E]``.
        copies: int64 ``[E, C]``, ascending, padded with -1.

    Returns:
        int64 ``[T, K]`` without -2.
    """
    flat_experts, flat_gpus = experts.flatten(), gpus.flatten().clone()
    for expert in (chosen == SPLIT).nonzero().flatten().tolist():
        pairs = ((flat_experts == expert) & (flat_gpus == SPLIT)).nonzero().flatten()
        holders = copies[expert][copies[expert] >= 0]
        flat_gpus[pairs] = holders[torch.arange(len(pairs)) * len(holders) // len(pairs)]
    return flat_gpus.view_as(experts)


def level_slots_reference(ids: torch.Tensor, table: DispatchTable) -> torch.Tensor:
    """What `level_slots` computes, on any device by way of the host; the same arguments and results."""
    experts, copies = ids.long().cpu(), table.copies.cpu()
    counts = torch.bincount(experts.flatten(), minlength=len(copies))
    chosen = level_dispatch(counts, copies, table.num_gpus, table.split_above_tokens)
    gpus = split_pairs(experts, chosen[experts], chosen, copies)
    slots = torch.where(gpus == table.rank, table.slot_of_expert.cpu()[experts], -1)
    return slots.int().to(ids.device)
