"""Plain-torch reference of the slots' counts.

Shape legend: L MoE layers, T tokens, K choices per token, P slots.
"""

from __future__ import annotations

import torch


def add_slot_counts_reference(
    slots: torch.Tensor, places: torch.Tensor | None, pairs: torch.Tensor, active: torch.Tensor | None = None
) -> None:
    """What `add_slot_counts` does, on any device; the same arguments."""
    num_layers, num_slots = pairs.shape
    bins = slots.long().masked_fill(slots < 0, num_slots)  # behind all slots
    if places is not None:
        bins = bins.masked_fill((places < 0)[None, :, None], num_slots)
    bins = bins.flatten(1)
    counts = pairs.new_zeros((num_layers, num_slots + 1))
    counts = counts.scatter_add_(1, bins, torch.ones_like(bins))[:, :num_slots]
    pairs += counts
    if active is not None:
        active += counts > 0
