"""Triton kernel of the rule `level`: one program chooses a copy for every active expert of a step.

Shape legend: T tokens, K choices per token, N = T·K pairs, E experts padded to a power of two, G = 8 GPUs,
L lanes of a warp, one for each GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two
from kernels.level_dispatch import table as tables
from kernels.level_dispatch.choose import GPUS, LANES, SPLIT_BIT, serve, shortest_path
from kernels.level_dispatch.table import DispatchTable

LARGEST_BLOCK = 1024
GROUP = tl.constexpr(tables.GROUP)
INACTIVE = tl.constexpr(-1)
SPLIT = tl.constexpr(-2)


@triton.jit
def _union(left, right):
    return left | right


@triton.jit
def count_pairs(ids, num_pairs, PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Pairs of every expert, int32 ``[E]``; where there is padding, its experts are below 0."""
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        found = tl.load(ids + pairs, mask=pairs < num_pairs, other=0)
        counted = pairs < num_pairs
        if PADDED:
            counted = counted & (found >= 0)
            found = tl.maximum(found, 0)
        counts_E += tl.histogram(found, BLOCK_E, mask=counted)
    return counts_E


@triton.jit
def count_singles(active_E, holders_E):
    """Active experts without a choice on every GPU, int32 ``[L]``; four GPUs are counted in one sum."""
    lanes = tl.arange(0, LANES)
    low_E = tl.zeros_like(holders_E).to(tl.int64)
    high_E = low_E
    for gpu in tl.static_range(4):
        low_E |= ((holders_E >> gpu) & 1).to(tl.int64) << (16 * gpu)
        high_E |= ((holders_E >> (gpu + 4)) & 1).to(tl.int64) << (16 * gpu)
    low = tl.sum(tl.where(active_E, low_E, 0), 0)
    high = tl.sum(tl.where(active_E, high_E, 0), 0)
    counts_L = ((tl.where(lanes < 4, low, high) >> (16 * (lanes % 4))) & 0xFFFF).to(tl.int32)
    return tl.where(lanes < GPUS, counts_L, 0)


@triton.jit
def move_along(path, gpu_E, holders_E, experts):
    """On every edge of a path, move the expert with the lowest id that has a copy at the edge's end."""
    start = (path & 15) - 1
    rest = path >> 4
    while rest != 0:
        end = (rest & 15) - 1
        movable_E = (gpu_E == start) & ((holders_E >> end) & 1 != 0)
        lowest = tl.min(tl.where(movable_E, experts, 1 << 30), 0)
        gpu_E = tl.where(experts == lowest, end.to(tl.int32), gpu_E)
        start = end
        rest = rest >> 4
    return gpu_E, start.to(tl.int32)


@triton.jit
def level_out(gpu_E, loads_L, holders_E, experts, num_gpus):
    """Move experts along shortest paths of alternative copies while that lowers a GPU above the least possible."""
    gpus = tl.arange(0, GPUS)
    lanes = tl.arange(0, LANES)
    real_L = lanes < num_gpus
    least = (tl.sum(tl.where(real_L, loads_L, 0), 0) + num_gpus - 1) // num_gpus
    open_GPUs = tl.sum(tl.where(real_L & (loads_L > least), 1 << lanes, 0), 0)  # above the least, not tried yet
    while open_GPUs != 0:
        placed_GE = gpu_E[None, :] == gpus[:, None]
        bytes_G = tl.reduce(tl.where(placed_GE, holders_E[None, :], 0), 1, _union)
        adjacency = tl.sum(bytes_G.to(tl.int64) << (8 * gpus), 0)
        path = adjacency * 0
        while (open_GPUs != 0) & (path == 0):
            is_open_L = (open_GPUs >> lanes) & 1 != 0
            busiest = tl.max(tl.where(is_open_L, loads_L * GPUS + GPUS - 1 - lanes, -1), 0)
            source = GPUS - 1 - busiest % GPUS
            open_GPUs = open_GPUs & ~((source * 0 + 1) << source)
            relief_L = real_L & (loads_L <= busiest // GPUS - 2)
            path = shortest_path(source, tl.sum(tl.where(relief_L, 1 << lanes, 0), 0), adjacency)
        if path != 0:
            source = ((path & 15) - 1).to(tl.int32)
            gpu_E, target = move_along(path, gpu_E, holders_E, experts)
            loads_L += (lanes == target).to(tl.int32) - (lanes == source).to(tl.int32)
            open_GPUs = tl.sum(tl.where(real_L & (loads_L > least), 1 << lanes, 0), 0)
    return gpu_E


@triton.jit
def serve_in_order(words, choices, loads_L, first, last):
    """Serve the experts with several copies one after another; keeps each one's GPU.

    Args:
        words: int64, four fields of sixteen bits each, as `serve` takes them, by place in the order.
        choices: int32, four bits per place are written, eight places to a word.
        loads_L: active experts of every GPU before.
        first: place of the first such expert.
        last: after the last one.
    """
    keys_L = loads_L * GPUS + tl.arange(0, LANES)
    begin = first // GROUP
    low = tl.load(words + begin * 2)
    high = tl.load(words + begin * 2 + 1)
    for group in range(begin, (last + GROUP - 1) // GROUP):
        next_low = tl.load(words + group * 2 + 2)  # while these are served
        next_high = tl.load(words + group * 2 + 3)
        if (low | high) != 0:
            chosen = group * 0
            for place in tl.static_range(GROUP):
                word = low if place < 4 else high
                field = (word >> (16 * (place % 4))).to(tl.int32) & 0xFFFF
                gpu, keys_L = serve(field, keys_L)
                chosen |= gpu << (4 * place)
            tl.store(choices + group, chosen)
        low = next_low
        high = next_high
    return keys_L // GPUS


@triton.jit
def write_runs(ids, slots, served, expert, slot, held, count, num_pairs, rank, BLOCK: tl.constexpr):
    """Give this rank its run of a split expert's pairs: the i-th of n goes to copy i·copies // n; and all their GPU."""
    copies = held * 0
    mine = held * 0  # which of the copies this rank has
    for gpu in tl.static_range(GPUS):
        copies += (held >> gpu) & 1
        mine += tl.where(gpu < rank, (held >> gpu) & 1, 0)
    seen = count * 0
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        own = tl.load(ids + pairs, mask=pairs < num_pairs, other=-1) == expert
        ordinal = seen + tl.cumsum(own.to(tl.int32), 0) - 1
        copy = ordinal * copies // count
        tl.store(slots + pairs, slot, mask=own & (copy == mine) & (slot >= 0))
        if served is not None:
            gpu_of_copy = copy * 0
            before = held * 0
            for gpu in tl.static_range(GPUS):
                holds = (held >> gpu) & 1
                gpu_of_copy = tl.where((copy == before) & (holds != 0), gpu, gpu_of_copy)
                before += holds
            tl.store(served + pairs, gpu_of_copy, mask=own)
        seen += tl.sum(own.to(tl.int32), 0)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_single", "num_gpus", "split_above", "rank"])
def level_kernel(
    ids,
    counts,
    holders,
    places,
    slot_of_expert,
    fields,
    words,
    choices,
    chosen,
    slots,
    served,
    num_pairs,
    num_experts,
    num_single,
    num_gpus,
    split_above,
    rank,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Choose, and give every pair its slot on this rank, or -1; ``slots`` is left out where ``counts`` are given.

    Where there is ``served``, every pair's GPU goes there, and experts below 0 are padding.
    """
    experts = tl.arange(0, BLOCK_E)
    gpus = tl.arange(0, GPUS)
    real_E = experts < num_experts
    holders_E = tl.load(holders + experts, mask=real_E, other=0)
    places_E = tl.load(places + experts, mask=real_E, other=0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if counts is None:
        counts_E = tl.where(real_E, count_pairs(ids, num_pairs, served is not None, BLOCK, BLOCK_E), 0)
    else:
        counts_E = tl.load(counts + experts, mask=real_E, other=0)
    single_E = places_E < num_single
    split_E = (counts_E > split_above) & (split_above >= 0) & ~single_E
    field_E = tl.where((counts_E > 0) & ~single_E, holders_E | (split_E.to(tl.int32) << SPLIT_BIT), 0)
    tl.store(fields + places_E, field_E.to(tl.int16), mask=real_E)
    tl.debug_barrier()
    bits_GE = (holders_E[None, :] >> gpus[:, None]) & 1
    loads_L = count_singles(single_E & (counts_E > 0), holders_E)
    loads_L = serve_in_order(words, choices, loads_L, num_single, num_experts)
    tl.debug_barrier()
    served_E = tl.load(choices + places_E // GROUP, mask=field_E != 0, other=0)
    gpu_E = (served_E >> (4 * (places_E % GROUP))) & 15
    gpu_E = tl.where(single_E, tl.sum(bits_GE * gpus[:, None], 0), gpu_E)
    gpu_E = tl.where(counts_E == 0, INACTIVE, tl.where(split_E, SPLIT, gpu_E))
    gpu_E = level_out(gpu_E, loads_L, holders_E, experts, num_gpus)
    tl.store(chosen + experts, gpu_E, mask=real_E)
    if slots is not None:
        tl.debug_barrier()
        for start in range(0, num_pairs, BLOCK):
            pairs = start + tl.arange(0, BLOCK)
            expert = tl.load(ids + pairs, mask=pairs < num_pairs, other=0)
            real = pairs < num_pairs
            if served is not None:
                real = real & (expert >= 0)
                expert = tl.maximum(expert, 0)
            gpu = tl.load(chosen + expert)
            slot = tl.load(slot_of_expert + expert)
            tl.store(slots + pairs, tl.where((gpu == rank) & real, slot, -1), mask=pairs < num_pairs)
            if served is not None:
                tl.store(served + pairs, tl.where(real, gpu, -1), mask=pairs < num_pairs)
        rest_E = gpu_E == SPLIT
        tl.debug_barrier()  # their runs are written over what stands there now, perhaps by other threads
        while tl.max(rest_E.to(tl.int32), 0) > 0:
            expert = tl.min(tl.where(rest_E, experts, 1 << 30), 0)
            rest_E = rest_E & (experts != expert)
            held = tl.load(holders + expert)
            count = tl.sum(tl.where(experts == expert, counts_E, 0), 0)
            slot = tl.load(slot_of_expert + expert)
            write_runs(ids, slots, served, expert, slot, held, count, num_pairs, rank, BLOCK)


def level_triton(
    ids: torch.Tensor,
    table: DispatchTable,
    counts: torch.Tensor | None = None,
    served: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose the copies of a step's experts.

    Args:
        ids: int32 ``[T, K]``, contiguous; not read where counts are given.
        table: of the layer; its scratch memory is used, so launches with one table must follow each other.
        counts: pairs of every expert, int32 ``[E]``; None counts them, which takes one program long if there are many.
        served: takes the GPU of every pair, int32 ``[T, K]``, where counts are not given; ids below 0 are then padding.

    Returns:
        For every expert its GPU, -1 where it has no pairs, -2 where it is split, int32 ``[E]``; and unless counts are
        given, the slots of all pairs like ``ids``, -1 on other ranks.
    """
    num_experts = len(table.holders)
    slots = torch.empty_like(ids) if counts is None else None
    chosen = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    block = min(max(power_of_two(ids.numel()), 128), LARGEST_BLOCK)
    level_kernel[(1,)](
        ids,
        counts,
        table.holders,
        table.places,
        table.slot_of_expert,
        table.fields.view(torch.int16),
        table.fields,
        table.choices,
        chosen,
        slots,
        served,
        ids.numel(),
        num_experts,
        table.num_single,
        table.num_gpus,
        -1 if table.split_above_tokens is None else table.split_above_tokens,
        table.rank,
        BLOCK=block,
        BLOCK_E=power_of_two(max(num_experts, 16)),
        num_warps=4,
        **overlap(ids),
    )
    return chosen, slots
