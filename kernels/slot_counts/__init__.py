"""How much work every slot gets: token–expert pairs of a pass, added up over passes for all layers at once.

Shape legend: L MoE layers, T tokens, K choices per token, P slots.
"""

from __future__ import annotations

import torch

from kernels.slot_counts.reference import add_slot_counts_reference

__all__ = ["add_slot_counts", "add_slot_counts_reference"]


def add_slot_counts(
    slots: torch.Tensor, places: torch.Tensor | None, pairs: torch.Tensor, active: torch.Tensor | None = None
) -> None:
    """Add a pass to the totals in place, in one launch and without asking the host.

    Args:
        slots: slot of every pair, int32 ``[L, T, K]``; -1 for pairs of other ranks, which are not counted.
        places: integer ``[T]``, negative for tokens that are padding, which are not counted; None counts all.
        pairs: totals of pairs, int64 ``[L, P]``.
        active: totals of passes in which a slot had any pair, int64 ``[L, P]``; None where they are not wanted.
    """
    if slots.is_cuda:
        from kernels.slot_counts.kernel import add_slot_counts_triton

        add_slot_counts_triton(slots, places, pairs, active)
    else:
        add_slot_counts_reference(slots, places, pairs, active)
