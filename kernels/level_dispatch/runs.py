"""From the choice for every expert to the slot of every pair, in plain torch operators that never ask the host.

Shape legend: E logical experts, T tokens, K choices per token.
"""

from __future__ import annotations

import torch

from kernels.level_dispatch.reference import SPLIT
from kernels.level_dispatch.table import DispatchTable


def slots_of_choices(
    ids: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor, table: DispatchTable
) -> torch.Tensor:
    """Slots of the pairs that this rank serves, int32 ``[T, K]``, -1 for others; see `gpus_of_choices`."""
    return slots_here(ids, gpus_of_choices(ids, chosen, counts, table), table)


def gpus_of_choices(
    ids: torch.Tensor, chosen: torch.Tensor, counts: torch.Tensor, table: DispatchTable
) -> torch.Tensor:
    """GPUs of all pairs.

    Args:
        ids: logical experts, int32 ``[T, K]``; below 0 for padding.
        chosen: GPU of every expert, -2 where it is split, integer ``[E]``.
        counts: pairs of every expert, integer ``[E]``.
        table: of the layer's plan.

    Returns:
        int32 ``[T, K]``; undefined in padding.
    """
    experts = ids.flatten().long()
    order = experts.argsort(stable=True)  # padding comes first
    first = counts.long().cumsum(0) - counts + (len(experts) - counts.sum())
    ordinal = torch.empty_like(experts)  # of a pair among its expert's
    ordinal[order] = torch.arange(len(experts), device=ids.device) - first[experts[order]]
    copy = ordinal * (table.copies >= 0).sum(dim=1)[experts] // counts[experts].clamp(min=1)
    split = (chosen[experts] == SPLIT) & (experts >= 0)
    gpus = torch.where(split, table.copies[experts, torch.where(split, copy, 0)], chosen[experts])
    return gpus.int().view_as(ids)


def slots_here(ids: torch.Tensor, gpus: torch.Tensor, table: DispatchTable) -> torch.Tensor:
    """Slots of the pairs whose GPU is this rank, int32 ``[T, K]``, -1 for others."""
    return torch.where(gpus == table.rank, table.slot_of_expert[ids.long()], -1)
