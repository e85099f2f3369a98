"""Plain-torch reference of the permutation.

Shape legend: T tokens, K choices per token, P local slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Permutation(NamedTuple):
    """Token–expert pairs by slot. A pair's index is token · K + choice.

    Attributes:
        order: pairs slot by slot, ascending within a slot, int32 ``[T·K]``; undefined from ``indptr[P]`` on.
        indptr: slot p has the pairs ``order[indptr[p] : indptr[p + 1]]``, int32 ``[P + 1]``.
    """

    order: torch.Tensor
    indptr: torch.Tensor


def permute_reference(slots: torch.Tensor, num_slots: int) -> Permutation:
    """What `permute` computes, on any device; the same arguments and results."""
    flat = slots.flatten()
    last = torch.where(flat < 0, num_slots, flat)  # pairs of other ranks come behind all slots
    order = last.sort(stable=True).indices.int()
    counts = torch.bincount(last, minlength=num_slots)[:num_slots]
    indptr = torch.zeros(num_slots + 1, dtype=torch.int32, device=slots.device)
    indptr[1:] = counts.cumsum(0)
    return Permutation(order, indptr)
