"""Triton kernel of the permutation: one program per slot reads all pairs, so that none waits for another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two
from kernels.permute.reference import Permutation

LARGEST_BLOCK = 4096


@triton.jit
def permute_kernel(slots, order, indptr, num_pairs, num_slots, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Count the pairs before the program's slot, then list its own."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.program_id(0)
    before_N = tl.zeros([BLOCK], tl.int32)
    own_N = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        found = tl.load(slots + pairs, mask=pairs < num_pairs, other=-1)
        before_N += ((found >= 0) & (found < slot)).to(tl.int32)
        own_N += (found == slot).to(tl.int32)
    end = tl.sum(before_N, 0)
    own = tl.sum(own_N, 0)
    tl.store(indptr + slot, end)
    tl.store(indptr + num_slots, end + own, mask=slot == num_slots - 1)
    if own > 0:
        for start in range(0, num_pairs, BLOCK):
            pairs = start + tl.arange(0, BLOCK)
            mine = tl.load(slots + pairs, mask=pairs < num_pairs, other=-1) == slot
            rank = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order + end + rank - 1, pairs, mask=mine)
            end += tl.sum(mine.to(tl.int32), 0)


def empty_permutation(num_pairs: int, num_slots: int, device: torch.device) -> Permutation:
    """A permutation to be filled by a kernel."""
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    return Permutation(order, torch.empty(num_slots + 1, dtype=torch.int32, device=device))


def permute_triton(slots: torch.Tensor, num_slots: int) -> Permutation:
    """What `permute` computes; the same arguments and results."""
    permutation = empty_permutation(slots.numel(), num_slots, slots.device)
    block = min(max(power_of_two(slots.numel()), 32), LARGEST_BLOCK)
    warps = max(1, min(8, block // 128))
    permute_kernel[(num_slots,)](
        slots.contiguous(), *permutation, slots.numel(), num_slots, BLOCK=block, num_warps=warps, **overlap(slots)
    )
    return permutation
