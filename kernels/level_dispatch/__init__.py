"""Dispatch rules `level` and `nearest`: which copy of each expert serves a step.

Shape legend: E logical experts, C most copies of any expert, T tokens, K choices per token, G GPUs.
"""

from __future__ import annotations

import torch

from kernels.level_dispatch.reference import (
    INACTIVE,
    SPLIT,
    level_dispatch,
    level_slots_reference,
    pairs_at_home,
    split_pairs,
)
from kernels.level_dispatch.runs import gpus_of_choices, slots_here, slots_of_choices
from kernels.level_dispatch.table import MOST_GPUS, DispatchTable

__all__ = [
    "INACTIVE",
    "MOST_GPUS",
    "SPLIT",
    "DispatchTable",
    "dispatch_tokens",
    "level_dispatch",
    "level_pairs",
    "level_slots",
]

MOST_PAIRS = 8192  # that one program counts and lays out; with more, all multiprocessors do it


def level_slots(ids: torch.Tensor, table: DispatchTable) -> torch.Tensor:
    """Choose by `level` which of a step's pairs this rank serves; nothing waits for the host on GPUs.

    Args:
        ids: logical experts of every token, int32 ``[T, K]``, the same on every rank.
        table: of the layer's plan, as this rank sees it.

    Returns:
        The slot of every pair, int32 ``[T, K]``; -1 where another rank serves it.
    """
    if not table.has_copies:
        return table.slot_of_expert[ids.long()]
    if ids.is_cuda and table.num_gpus <= MOST_GPUS:
        from kernels.level_dispatch.kernel import level_triton

        if 0 < ids.numel() <= MOST_PAIRS:
            slots = level_triton(ids, table)[1]
            assert slots is not None
            return slots
        counts = _count(ids, table)
        return slots_of_choices(ids, level_triton(ids, table, counts)[0], counts, table)
    return level_slots_reference(ids, table)


def level_pairs(ids: torch.Tensor, table: DispatchTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose by `level` which GPU serves each of a step's pairs; nothing waits for the host on GPUs.

    Args:
        ids: logical experts of every token, int32 ``[T, K]``, the same on every rank; -1 in all choices of padding.
        table: of the layer's plan, as this rank sees it.

    Returns:
        The slot of every pair on this rank, -1 where another rank serves it, and the rank that serves it; both int32
        ``[T, K]``, -1 in padding.
    """
    if table.has_copies and ids.is_cuda and table.num_gpus <= MOST_GPUS:
        from kernels.level_dispatch.kernel import level_triton

        if 0 < ids.numel() <= MOST_PAIRS:
            served = torch.empty_like(ids)
            slots = level_triton(ids, table, served=served)[1]
            assert slots is not None
            return slots, served
        counts = _count(ids, table)
        gpus = gpus_of_choices(ids, level_triton(ids, table, counts)[0], counts, table)
    elif not table.has_copies:
        gpus = table.copies[:, 0].int()[ids.long()]
    else:
        real = ids >= 0
        gpus = torch.full_like(ids, -1)
        gpus[real] = dispatch_tokens(ids[real][:, None], table.copies, table.num_gpus, table.split_above_tokens).int()[
            :, 0
        ]
    gpus = torch.where(ids < 0, -1, gpus)
    return slots_here(ids, gpus, table), gpus


def _count(ids: torch.Tensor, table: DispatchTable) -> torch.Tensor:
    """Pairs of every expert, int32 ``[E]``, without those below 0."""
    flat = ids.flatten()
    return torch.zeros_like(table.holders).scatter_add_(0, flat.clamp(min=0).long(), (flat >= 0).int())


def dispatch_tokens(
    experts: torch.Tensor,
    copies: torch.Tensor,
    num_gpus: int,
    split_above_tokens: int | None,
    homes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the GPU of every token–expert pair of a layer and step: by `nearest` where homes are given, else `level`.

    Args:
        experts: logical expert ids, integer ``[T, K]``.
        copies: GPUs that hold a copy of each expert, int64 ``[E, C]``, ascending, padded with -1.
        num_gpus: number of GPUs G.
        split_above_tokens: an expert with more pairs than this and at least two copies is split over all of them;
            None never splits. Pairs served at home do not count.
        homes: the GPU each token lives on, integer ``[T]``, or -1; a pair whose token lives with a copy of its expert
            is served there.

    Returns:
        GPU ids, int64 ``[T, K]``, on the device of ``experts``.
    """
    if copies.shape[1] == 1:  # one copy each: nothing to choose, and no round trip to the host
        return copies.to(experts.device)[:, 0][experts.long()]
    host, copies = experts.long().cpu(), copies.cpu()
    at_home = torch.zeros_like(host, dtype=torch.bool) if homes is None else pairs_at_home(host, copies, homes.cpu())
    tokens_per_expert = torch.bincount(host[~at_home], minlength=copies.shape[0])
    chosen = level_dispatch(tokens_per_expert, copies, num_gpus, split_above_tokens)
    gpus = chosen[host]
    if homes is not None:
        gpus = torch.where(at_home, homes.long().cpu()[:, None], gpus)
    if (chosen == SPLIT).any():
        gpus = split_pairs(host, gpus, chosen, copies)
    return gpus.to(experts.device)
