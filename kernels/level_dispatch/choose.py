"""Triton functions of the rule `level`: serving experts one after another, and paths from a busy GPU to an idle one.

Both work on scalars, which every thread holds: a step in the order of experts then takes some thirty cycles, where a
reduction over a vector of GPUs would take hundreds. At most eight GPUs; sets of GPUs are bits of an integer.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 24)  # beyond every load
SPLIT_BIT = tl.constexpr(8)  # of an expert's sixteen bits: served by all of its GPUs
GPUS = tl.constexpr(8)


@triton.jit
def offered(key, field, GPU: tl.constexpr):
    """The key of a GPU that may serve the expert, else one beyond all keys."""
    return tl.where((field >> GPU) & 1 != 0, key, FAR)


@triton.jit
def served(key, field, best, GPU: tl.constexpr):
    """The key of a GPU after the expert was served by the best one, or by all of its GPUs."""
    serves = (key == best) | ((field >> SPLIT_BIT) & 1 != 0)
    return tl.where(serves & ((field >> GPU) & 1 != 0), key + GPUS, key)


@triton.jit
def serve(field, k0, k1, k2, k3, k4, k5, k6, k7):
    """Serve one expert, whose holders are the field's low bits; none where they are 0.

    A GPU's key is its number of active experts times eight, plus its id: the least key is the GPU to take.

    Returns:
        The GPU, and the new keys.
    """
    best = tl.minimum(
        tl.minimum(
            tl.minimum(offered(k0, field, 0), offered(k1, field, 1)),
            tl.minimum(offered(k2, field, 2), offered(k3, field, 3)),
        ),
        tl.minimum(
            tl.minimum(offered(k4, field, 4), offered(k5, field, 5)),
            tl.minimum(offered(k6, field, 6), offered(k7, field, 7)),
        ),
    )
    return (
        best % GPUS,
        served(k0, field, best, 0),
        served(k1, field, best, 1),
        served(k2, field, best, 2),
        served(k3, field, best, 3),
        served(k4, field, best, 4),
        served(k5, field, best, 5),
        served(k6, field, best, 6),
        served(k7, field, best, 7),
    )


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
