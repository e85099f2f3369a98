"""Permutation: which token–expert pairs each slot has to compute, in CSR form.

Shape legend: T tokens, K choices per token, P local slots.
"""

from __future__ import annotations

import torch

from kernels.permute.reference import Permutation, permute_reference

__all__ = ["Permutation", "permute", "permute_reference"]


def permute(slots: torch.Tensor, num_slots: int) -> Permutation:
    """List the pairs of every slot in ascending order, without sorting by value and without asking the host.

    Args:
        slots: slot of every pair, int32 ``[T, K]``; -1 for pairs of other ranks, which are left out.
        num_slots: slots of this rank P.

    Returns:
        `Permutation`.
    """
    if slots.is_cuda:
        from kernels.permute.kernel import permute_triton

        return permute_triton(slots, num_slots)
    return permute_reference(slots, num_slots)
