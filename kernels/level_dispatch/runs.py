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
    """Slots of the pairs that this rank serves.

    Args:
        ids: logical experts, int32 ``[T, K]``.
        chosen: GPU of every expert, -2 where it is split, integer ``[E]``.
        counts: pairs of every expert, integer ``[E]``.
        table: of the layer's plan.

    Returns:
        int32 ``[T, K]``, -1 where another rank serves the pair.
    """
    experts = ids.flatten().long()
    order = experts.argsort(stable=True)
    first = counts.long().cumsum(0) - counts
    ordinal = torch.empty_like(experts)  # of a pair among its expert's
    ordinal[order] = torch.arange(len(experts), device=ids.device) - first[experts[order]]
    copy = ordinal * (table.copies >= 0).sum(dim=1)[experts] // counts[experts]
    split = chosen[experts] == SPLIT
    gpus = torch.where(split, table.copies[experts, torch.where(split, copy, 0)], chosen[experts])
    return torch.where(gpus == table.rank, table.slot_of_expert[experts], -1).int().view_as(ids)
