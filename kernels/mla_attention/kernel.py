"""Triton kernel of latent decode attention: split over the context, one program per sequence, split and 32 heads.

Every tile of the cache is read once and used twice, as keys and as values. The heads stand in the columns of both
products: the wide tile goes to the matrix units from shared memory, and only the heads' weights through registers,
which hold no more than those of 32 heads.

Shape legend: B sequences, H heads, C latent size, r rotated part, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_attention.kernel import LOG2_E, add_splits, split_range
from kernels.decode_attention.splits import MAX_SPLITS, Tiles, choose_splits
from kernels.errors import OperatorError
from kernels.launch import overlap

MIN_HEADS, MAX_HEADS = 16, 32  # of a program: what the matrix units take, and what registers hold


@triton.jit(do_not_specialize=["splits", "table_stride"])
def _mla_attention(
    q_latent,
    q_rope,
    cache,
    page_table,
    lengths,
    partial,
    peaks,
    totals,
    scale_log2,
    splits,
    table_stride,
    latent_token_stride,
    latent_head_stride,
    rope_token_stride,
    rope_head_stride,
    page_stride,
    entry_stride,
    H: tl.constexpr,
    C: tl.constexpr,
    ROPE: tl.constexpr,  # r
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    split, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    column, turned = tl.arange(0, C), tl.arange(0, ROPE)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    length = tl.load(lengths + sequence)
    start, end, _ = split_range(length, 0, split, splits, BLOCK)
    if start >= end:
        return
    exists = (head < H)[:, None]
    latent_row = q_latent + sequence * latent_token_stride + head[:, None] * latent_head_stride
    rope_row = q_rope + sequence * rope_token_stride + head[:, None] * rope_head_stride
    query = tl.trans(tl.load(latent_row + column[None, :], mask=exists, other=0.0))
    query_rope = tl.trans(tl.load(rope_row + turned[None, :], mask=exists, other=0.0))
    peak = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    values = tl.zeros((C, BLOCK_H), tl.float32)
    for block in range(start, end):
        token = block * BLOCK + tl.arange(0, BLOCK)
        read = tl.minimum(token, length - 1)  # beyond the length, the last token again: nothing undefined is read
        page = tl.load(page_table + sequence * table_stride + read // PAGE).to(tl.int64)
        entry = cache + (page * page_stride + read % PAGE * entry_stride)[:, None]
        latent = tl.load(entry + column[None, :])
        key_rope = tl.load(entry + C + turned[None, :])
        scores = tl.dot(latent, query, input_precision="ieee")
        scores = tl.dot(key_rope, query_rope, scores, input_precision="ieee") * scale_log2
        scores = tl.where((read == token)[:, None], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=0))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[None, :])
        total = total * shrink + tl.sum(weights, axis=0)
        values = values * shrink[None, :]
        values = tl.dot(tl.trans(latent), weights.to(latent.dtype), values, input_precision="ieee")
        peak = new_peak
    index = (sequence * splits + split) * H + head
    tl.store(peaks + index, peak, mask=head < H)
    tl.store(totals + index, total, mask=head < H)
    tl.store(partial + index[None, :] * C + column[:, None], values, mask=(head < H)[None, :])


def choose_tiles(dtype: torch.dtype) -> Tiles:
    """Tiles that fit into shared memory in two stages."""
    return Tiles(block=64 if dtype.itemsize == 2 else 32, warps=4, stages=2, programs_per_sm=1, least=64)


def mla_attention_triton(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """What `mla_attention` computes, on a GPU or in the interpreter; the same arguments and results.

    Raises:
        OperatorError: C or r is not a power of two.
    """
    batch, num_heads, size = q_latent.shape
    rotated, page_size = q_rope.shape[2], cache.shape[1]
    for name, value in (("latent size", size), ("rotated part", rotated)):
        if value & (value - 1):
            raise OperatorError(f"{name} {value}: the kernel needs a power of two; use mla_attention_reference")
    tiles = tiles or choose_tiles(q_latent.dtype)
    splits = choose_splits(batch, page_table.shape[1] * page_size, tiles, q_latent.device)
    out = torch.empty((batch, num_heads, size), dtype=q_latent.dtype, device=q_latent.device)
    partial = torch.empty((batch, splits, num_heads, size), dtype=torch.float32, device=q_latent.device)
    peaks, totals = torch.empty((2, batch, splits, num_heads), dtype=torch.float32, device=q_latent.device).unbind(0)
    if batch == 0:
        return out
    heads = min(MAX_HEADS, max(MIN_HEADS, triton.next_power_of_2(num_heads)))
    _mla_attention[(splits, batch, triton.cdiv(num_heads, heads))](
        q_latent,
        q_rope,
        cache,
        page_table,
        lengths,
        partial,
        peaks,
        totals,
        scale * LOG2_E,
        splits,
        page_table.stride(0),
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        *cache.stride()[:2],
        H=num_heads,
        C=size,
        ROPE=rotated,
        PAGE=page_size,
        BLOCK_H=heads,
        BLOCK=tiles.block,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(out),
    )
    add_splits[(num_heads, batch)](
        partial,
        peaks,
        totals,
        lengths,
        q_latent,
        out,
        splits,
        H=num_heads,
        D=size,
        WINDOW=0,
        SINKS=False,
        BLOCK_SPLITS=MAX_SPLITS,
        BLOCK_D=size,
        BLOCK=tiles.block,
        LOG2_E=LOG2_E,
        num_warps=16,
        **overlap(out),
    )
    return out
