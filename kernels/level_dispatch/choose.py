"""Triton functions of the rule `level`: serving experts one after another, and paths from a busy GPU to an idle one.

Experts are served with one GPU in each lane of a warp, whose minimum is one instruction, so that a step in their order
takes some forty cycles. Paths are found with scalars: sets of GPUs are bits of an integer. At most eight GPUs.

Shape suffix: L lanes of a warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 24)  # beyond every load
SPLIT_BIT = tl.constexpr(8)  # of an expert's sixteen bits: served by all of its GPUs
HOLDERS = tl.constexpr(255)  # the bits of its GPUs
GPUS = tl.constexpr(8)
LANES = tl.constexpr(32)  # those beyond the GPUs hold nothing


@triton.jit
def serve(field, keys_L):
    """Serve one expert, whose holders are the field's low bits; none where they are 0.

    A GPU's key is its number of active experts times eight, plus its id: the least key is the GPU to take.

    Returns:
        The GPU, and the new keys.
    """
    lanes = tl.arange(0, LANES)
    holds_L = ((field & HOLDERS) >> lanes) & 1 != 0
    best = tl.min(tl.where(holds_L, keys_L, FAR), 0)
    serves_L = holds_L & ((keys_L == best) | ((field >> SPLIT_BIT) & 1 != 0))
    return best % GPUS, tl.where(serves_L, keys_L + GPUS, keys_L)


@triton.jit
def shortest_path(source, relief, adjacency):
    """A shortest path from a GPU to one of a set, breadth first; ties to the GPU found first, then to lower ids.

    Args:
        source: GPU, int32.
        relief: the set.
        adjacency: int64, byte u has the GPUs that an expert of GPU u could move to.

    Returns:
        int64, four bits per GPU from the source on, each the id plus 1; 0 where there is no path.
    """
    start = source.to(tl.int64)
    queue = start  # four bits per GPU, in the order they were found
    parents = start * 0  # four bits per GPU
    visited = (start * 0 + 1) << start
    found = start * 0  # in the level that is being searched from
    reached = start * 0
    head = source * 0
    tail = source * 0 + 1
    level_end = tail
    while (head < tail) & (reached == 0):
        node = (queue >> (4 * head)) & 15
        new = (adjacency >> (8 * node)) & 255 & ~visited
        for gpu in tl.static_range(GPUS):
            is_new = (new >> gpu) & 1
            queue |= (is_new * gpu) << (4 * tail)
            parents |= (is_new * node) << (4 * gpu)
            tail += is_new.to(tl.int32)
        visited |= new
        found |= new
        head += 1
        if head == level_end:
            reached = found & relief
            found = found * 0
            level_end = tail
    path = start * 0
    if reached != 0:
        node = start * 0
        for gpu in tl.static_range(GPUS - 1, -1, -1):
            node = tl.where((reached >> gpu) & 1 != 0, gpu, node)
        path = node + 1
        while node != start:
            node = (parents >> (4 * node)) & 15
            path = (path << 4) | (node + 1)
    return path
