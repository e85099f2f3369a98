"""Triton kernel of decode attention: split over the context, one program per sequence, key/value head and split.

All query heads of one key/value head share a program, so that every key and value is read once. Where there is more
than one split, a second kernel adds them up: one program per sequence and query head, every split in one load.

Shape legend: B sequences, H query heads, G key/value heads, R = H / G query heads per key/value head, d head size,
S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_attention.splits import Tiles, choose_splits, choose_tiles
from kernels.launch import overlap, power_of_two

LOG2_E = 1.4426950408889634
MIN_ROWS = 16  # of a tile that the matrix units take


@triton.jit
def split_range(length, oldest, split, splits, BLOCK: tl.constexpr):
    """The blocks of a split: every split of a sequence takes equally many, the last one what is left.

    Returns:
        First block, end, and how many splits have any.
    """
    first_block = oldest // BLOCK
    num_blocks = tl.cdiv(length, BLOCK) - first_block
    blocks_per_split = tl.maximum(tl.cdiv(num_blocks, splits), 1)
    start = first_block + split * blocks_per_split
    end = tl.minimum(start + blocks_per_split, first_block + num_blocks)
    return start, end, tl.cdiv(num_blocks, blocks_per_split)


@triton.jit(do_not_specialize=["splits"])
def add_splits(
    partial,
    peaks,
    totals,
    lengths,
    sinks,
    out,
    splits,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG2_E: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Add up the splits of one query head, each scaled to the greatest peak, and divide by the softmax's denominator.

    ``partial`` is float32 ``[B, S, H, d]``, ``peaks`` (greatest score of each split, in powers of two) and ``totals``
    (sum of its powers over that peak) are float32 ``[B, S, H]``.
    """
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths + sequence)
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    _, _, active = split_range(length, oldest, 0, splits, BLOCK)
    index = (sequence * splits + split) * H + head
    there = split < active
    peak_of = tl.load(peaks + index, mask=there, other=-float("inf"))
    total_of = tl.load(totals + index, mask=there, other=0.0)
    inside = there[:, None] & (column < D)[None, :]
    tile = tl.load(partial + index[:, None] * D + column[None, :], mask=inside, other=0.0)
    peak = tl.max(peak_of, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        peak = tl.maximum(peak, sink)
    weight = tl.exp2(peak_of - peak)
    total = tl.sum(total_of * weight, axis=0)
    if SINKS:
        total += tl.exp2(sink - peak)
    values = tl.sum(tile * weight[:, None], axis=0) / total
    values = tl.where(length > 0, values, 0.0)
    tl.store(out + (sequence * H + head) * D + column, values.to(out.dtype.element_ty), mask=column < D)


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
    WHOLE: tl.constexpr,  # one split, whose result is final
    ROWS: tl.constexpr,
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
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    length = tl.load(lengths + sequence)
    oldest = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    start, end, _ = split_range(length, oldest, split, splits, BLOCK)
    if start >= end:
        if WHOLE:
            tl.store(out + q_offset, tl.zeros((ROWS, BLOCK_D), out.dtype.element_ty), mask=inside)
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

    if WHOLE:
        if SINKS:
            sink = tl.load(sinks + tl.minimum(head, H - 1)).to(tl.float32) * LOG2_E
            peak_with_sink = tl.maximum(peak, sink)
            shrink = tl.exp2(peak - peak_with_sink)
            total = total * shrink + tl.exp2(sink - peak_with_sink)
            values = values * shrink[:, None]
        tl.store(out + q_offset, (values / total[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        index = (sequence * splits + split) * H + head
        tl.store(peaks + index, peak, mask=row < R)
        tl.store(totals + index, total, mask=row < R)
        tl.store(partial + index[:, None] * D + column[None, :], values, mask=inside)


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
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """What `decode_attention` computes, on a GPU or in the interpreter; the same arguments and results."""
    batch, num_heads, head_size = q.shape
    page_size, num_kv_heads = k_cache.shape[1:3]
    if tiles is None:
        tiles = choose_tiles(head_size, q.dtype)
    capacity = page_table.shape[1] * page_size
    reach = capacity if window is None else min(capacity, window + tiles.block - 1)
    splits = choose_splits(batch * num_kv_heads, reach, tiles, q.device)
    q, out = q.contiguous(), torch.empty_like(q)
    parts = (batch, splits, num_heads) if splits > 1 else (0,)
    partial = torch.empty((*parts, head_size), dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty((2, *parts), dtype=torch.float32, device=q.device).unbind(0)
    sink = q if sinks is None else sinks
    common = {
        "H": num_heads,
        "D": head_size,
        "WINDOW": window or 0,
        "SINKS": sinks is not None,
        "BLOCK_D": max(triton.next_power_of_2(head_size), MIN_ROWS),
        "BLOCK": tiles.block,
        "LOG2_E": LOG2_E,
        **overlap(q),
    }
    if batch:
        _decode_attention[(num_kv_heads, splits, batch)](
            q,
            k_cache,
            v_cache,
            page_table,
            lengths,
            sink,
            out,
            partial,
            peaks,
            totals,
            scale * LOG2_E,
            splits,
            page_table.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            R=num_heads // num_kv_heads,
            PAGE=page_size,
            WHOLE=splits == 1,
            ROWS=max(MIN_ROWS, triton.next_power_of_2(num_heads // num_kv_heads)),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **common,
        )
    if batch and splits > 1:
        add_splits[(num_heads, batch)](
            partial, peaks, totals, lengths, sink, out, splits, BLOCK_SPLITS=power_of_two(splits), num_warps=4, **common
        )
    return out
