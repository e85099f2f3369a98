"""Triton kernel of decode attention: split over the context, one program per sequence, key/value head and split.

All query heads of one key/value head share a program, so that every key and value is read once. The program that ends
last of a sequence and key/value head adds the splits up, always in the order of the context; so the result does not
depend on which one that is.

Shape legend: B sequences, H query heads, G key/value heads, R = H / G query heads per key/value head, d head size,
S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_attention.splits import MAX_SPLITS, arrival_counters, choose_splits
from kernels.launch import overlap

LOG2_E = 1.4426950408889634
MIN_ROWS = 16  # of a tile that the matrix units take


@triton.jit
def _finish(peak, total, values, sinks, head, LOG2_E: tl.constexpr, SINKS: tl.constexpr):
    """Divide summed values by the softmax's denominator, the sink's share included."""
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        peak_with_sink = tl.maximum(peak, sink)
        shrink = tl.exp2(peak - peak_with_sink)
        total = total * shrink + tl.exp2(sink - peak_with_sink)
        values = values * shrink[:, None]
    return values / total[:, None]


@triton.jit
def add_splits(
    partial,
    peaks,
    totals,
    first,
    active,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add the first ``active`` splits' values, each scaled to the greatest peak, in the order of the splits.

    Args:
        partial: float32 ``[…, S, R, WIDTH]`` of one sequence and head group, from ``first`` splits on.
        peaks: greatest score of each split in powers of two, float32 ``[…, S, R]``.
        totals: sum of each split's powers over that peak, float32 ``[…, S, R]``.

    Returns:
        Peak ``[ROWS]``, total ``[ROWS]`` and summed values ``[ROWS, BLOCK]``.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    every = tl.arange(0, SPLITS)[:, None]
    index = (first + every) * R + row[None, :]
    there = (every < active) & (row < R)[None, :]
    all_peaks = tl.load(peaks + index, mask=there, other=-float("inf"), cache_modifier=".cg")
    peak = tl.where(row < R, tl.max(all_peaks, axis=0), 0.0)
    all_totals = tl.load(totals + index, mask=there, other=0.0, cache_modifier=".cg")
    total = tl.sum(all_totals * tl.exp2(all_peaks - peak[None, :]), axis=0)
    values = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, active, CHUNK):
        split = start + tl.arange(0, CHUNK)[:, None]
        place = (first + split) * R + row[None, :]
        kept = (split < active) & (row < R)[None, :]
        weight = tl.exp2(tl.load(peaks + place, mask=kept, other=-float("inf"), cache_modifier=".cg") - peak[None, :])
        tile = tl.load(
            partial + place[:, :, None] * WIDTH + column[None, None, :],
            mask=kept[:, :, None] & (column < WIDTH)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        values += tl.sum(tile * weight[:, :, None], axis=0)
    return peak, total, values


@triton.jit(do_not_specialize=["splits", "table_stride"])
def _decode_attention(
    q,
    k_cache,
    v_cache,
    page_table,
    lengths,
    sinks,
    out,
    partial,
    peaks,
    totals,
    counters,
    scale_log2,
    splits,
    table_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_SUM: tl.constexpr,
    SPLITS_SUM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    group, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    head = group * R + row
    inside = (row < R)[:, None] & (column < D)[None, :]
    q_offset = sequence * (H * D) + head[:, None] * D + column[None, :]

    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    first_block = oldest // BLOCK
    num_blocks = tl.cdiv(length, BLOCK) - first_block
    blocks_per_split = tl.cdiv(num_blocks, splits)
    start = first_block + split * blocks_per_split
    end = tl.minimum(start + blocks_per_split, first_block + num_blocks)
    if length == 0:
        if split == 0:
            tl.store(out + q_offset, tl.zeros((ROWS, BLOCK_D), out.dtype.element_ty), mask=inside)
        return
    if start >= end:
        return

    query = tl.load(q + q_offset, mask=inside, other=0.0)
    k_head = k_cache + group * k_head_stride + column[None, :]
    v_head = v_cache + group * v_head_stride + column[None, :]
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for block in range(start, end):
        token = block * BLOCK + tl.arange(0, BLOCK)
        # Tokens outside what is attended to read one inside instead: no mask, and nothing undefined is multiplied by 0.
        read = tl.minimum(tl.maximum(token, oldest), length - 1)
        page = tl.load(page_table + sequence * table_stride + read // PAGE).to(tl.int64)
        k_tile = k_head + (page * k_page_stride + read % PAGE * k_token_stride)[:, None]
        v_tile = v_head + (page * v_page_stride + read % PAGE * v_token_stride)[:, None]
        if BLOCK_D == D:
            keys = tl.load(k_tile)
            value = tl.load(v_tile)
        else:
            keys = tl.load(k_tile, mask=(column < D)[None, :], other=0.0)
            value = tl.load(v_tile, mask=(column < D)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2
        scores = tl.where((read == token)[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        values = values * shrink[:, None]
        values = tl.dot(weights.to(value.dtype), value, values, input_precision="ieee")
        peak = new_peak

    active = tl.cdiv(num_blocks, blocks_per_split)
    if active == 1:
        result = _finish(peak, total, values, sinks, tl.minimum(head, H - 1), LOG2_E, SINKS)
        tl.store(out + q_offset, result.to(out.dtype.element_ty), mask=inside)
        return
    first = (sequence * (H // R) + group) * splits
    index = (first + split) * R + row
    tl.store(peaks + index, peak, mask=row < R)
    tl.store(totals + index, total, mask=row < R)
    tl.store(partial + index[:, None] * D + column[None, :], values, mask=inside)
    tl.debug_barrier()  # all stores of this program before its arrival
    counter = counters + sequence * (H // R) + group
    if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
        tl.store(counter, 0)
        row_sum = tl.arange(0, ROWS_SUM)
        head_sum = group * R + tl.minimum(row_sum, R - 1)
        peak_all, total_all, values_all = add_splits(
            partial, peaks, totals, first, active, R, D, SPLITS_SUM, ROWS_SUM, BLOCK_D, CHUNK
        )
        result = _finish(peak_all, total_all, values_all, sinks, head_sum, LOG2_E, SINKS)
        target = out + sequence * (H * D) + head_sum[:, None] * D + column[None, :]
        to_store = (row_sum < R)[:, None] & (column < D)[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=to_store)


def decode_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    *,
    block: int = 64,
    programs_per_sm: int = 2,
    num_warps: int = 4,
    num_stages: int = 3,
) -> torch.Tensor:
    """What `decode_attention` computes, on a GPU or in the interpreter; the same arguments and results, and the tuning."""
    batch, num_heads, head_size = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    per_group = num_heads // num_kv_heads
    q = q.contiguous()
    out = torch.empty_like(q)
    capacity = page_table.shape[1] * page_size
    reach = capacity if window is None else min(capacity, window + block - 1)
    splits = choose_splits(batch * num_kv_heads, reach, block, programs_per_sm, q.device)
    groups = (batch, num_kv_heads, splits, per_group)
    partial = torch.empty((*groups, head_size) if splits > 1 else (0,), dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty((2, *groups), dtype=torch.float32, device=q.device).unbind(0)
    block_d = max(triton.next_power_of_2(head_size), MIN_ROWS)
    rows_sum = triton.next_power_of_2(per_group)
    if batch:
        _decode_attention[(num_kv_heads, splits, batch)](
            q,
            k_cache,
            v_cache,
            page_table,
            lengths,
            q if sinks is None else sinks,
            out,
            partial,
            peaks,
            totals,
            arrival_counters(batch * num_kv_heads, q.device),
            scale * LOG2_E,
            splits,
            page_table.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            H=num_heads,
            R=per_group,
            D=head_size,
            PAGE=page_size,
            WINDOW=window or 0,
            SINKS=sinks is not None,
            ROWS=max(MIN_ROWS, rows_sum),
            ROWS_SUM=rows_sum,
            SPLITS_SUM=MAX_SPLITS,
            CHUNK=max(8192 // (rows_sum * block_d), 1),
            BLOCK_D=block_d,
            BLOCK=block,
            LOG2_E=LOG2_E,
            num_warps=num_warps,
            num_stages=num_stages,
            **overlap(q),
        )
    return out
