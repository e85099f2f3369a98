"""Triton kernel of the slots' counts: one program per layer makes a histogram of all its pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two

LARGEST_BLOCK = 1024


@triton.jit
def slot_counts_kernel(
    slots,
    places,
    pairs,
    active,
    num_pairs,
    num_slots,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add a layer's pairs by slot; what does not count falls into the bin behind the last slot."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    layer = tl.program_id(0)
    counts_P = tl.zeros([BINS], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + layer * num_pairs + index, mask=index < num_pairs, other=-1)
        if places is not None:
            place = tl.load(places + index // TOP_K, mask=index < num_pairs, other=-1)
            slot = tl.where(place < 0, -1, slot)
        counts_P += tl.histogram(tl.where(slot < 0, num_slots, slot), BINS)
    bins = tl.arange(0, BINS)
    totals = layer * num_slots + bins
    old_P = tl.load(pairs + totals, mask=bins < num_slots, other=0)
    tl.store(pairs + totals, old_P + counts_P, mask=bins < num_slots)
    if active is not None:
        old_P = tl.load(active + totals, mask=bins < num_slots, other=0)
        tl.store(active + totals, old_P + (counts_P > 0).to(tl.int64), mask=bins < num_slots)


def add_slot_counts_triton(
    slots: torch.Tensor, places: torch.Tensor | None, pairs: torch.Tensor, active: torch.Tensor | None = None
) -> None:
    """What `add_slot_counts` does; the same arguments."""
    num_layers, num_tokens, top_k = slots.shape
    block = min(max(power_of_two(num_tokens * top_k), 32), LARGEST_BLOCK)
    slot_counts_kernel[(num_layers,)](
        slots.contiguous(),
        places,
        pairs,
        active,
        num_tokens * top_k,
        pairs.shape[1],
        TOP_K=top_k,
        BLOCK=block,
        BINS=power_of_two(pairs.shape[1] + 1),
        num_warps=4,
        **overlap(slots),
    )
