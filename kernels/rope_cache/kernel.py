"""Triton kernel of query/key norms, rotary positions and cache writes: one program per token and block of heads.

A rotated pair stays in one thread: the halves (or the even and odd entries) of a head are loaded as two tiles, and the
part that is kept as a third.

Shape legend: T tokens, H query heads, G key/value heads, d head size, r rotated part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap

HEADS_PER_PROGRAM = 8


@triton.jit
def _inverse_rms(projection, COUNT: tl.constexpr, BLOCK: tl.constexpr, eps):
    """1 / root mean square of ``COUNT`` contiguous values."""
    entry = tl.arange(0, BLOCK)
    value = tl.load(projection + entry, mask=entry < COUNT, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(value * value, axis=0) / COUNT + eps)


@triton.jit
def _store(pointer, k_pointer, v_pointer, column, value, is_query, is_key, is_value):
    """Store a tile of heads to the queries, the key cache or the value cache, whichever each head belongs to."""
    tl.store(pointer + column, value, mask=is_query)
    tl.store(k_pointer + column, value, mask=is_key)
    tl.store(v_pointer + column, value, mask=is_value)


@triton.jit
def _rope_cache(
    qkv,
    positions,
    cos_sin,
    k_cache,
    v_cache,
    slot_index,
    q_norm,
    k_norm,
    q_out,
    eps,
    row_stride,
    k_page_stride,
    k_token_stride,
    k_head_stride,
    v_page_stride,
    v_token_stride,
    v_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # r / 2
    PAGE: tl.constexpr,
    NORM: tl.constexpr,  # "none", "head" or "projection"
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    is_query = head < H
    is_key = (head >= H) & (head < H + G)
    is_value = (head >= H + G) & (head < H + 2 * G)
    turns = head < H + G
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    has_pair = pair < HALF
    first_column = 2 * pair if INTERLEAVED else pair
    second_column = 2 * pair + 1 if INTERLEAVED else pair + HALF
    kept_column = 2 * HALF + tl.arange(0, BLOCK_KEPT)[None, :]
    has_kept = kept_column < D
    exists = head < H + 2 * G

    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = qkv + token * row_stride + head * D
    first = tl.load(source + first_column, mask=exists & has_pair, other=0.0).to(tl.float32)
    second = tl.load(source + second_column, mask=exists & has_pair, other=0.0).to(tl.float32)
    if 2 * HALF < D:
        kept = tl.load(source + kept_column, mask=exists & has_kept, other=0.0).to(tl.float32)
    if NORM != "none":
        if NORM == "head":
            squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            if 2 * HALF < D:
                squares += tl.sum(kept * kept, axis=1)
            inverse = tl.rsqrt(squares / D + eps)[:, None]
            q_weight, k_weight = q_norm + head * 0, k_norm + head * 0
        else:
            row = qkv + token * row_stride
            inverse = tl.where(
                is_query, _inverse_rms(row, H * D, BLOCK_Q, eps), _inverse_rms(row + H * D, G * D, BLOCK_K, eps)
            )
            q_weight, k_weight = q_norm + head * D, k_norm + (head - H) * D
        inverse = tl.where(turns, inverse, 1.0)
        for_q, for_k = is_query & has_pair, is_key & has_pair
        # Each load answers for its own kind of head and gives the other 1, or 0 to the sum: values keep a weight of 1.
        scale = tl.load(q_weight + first_column, mask=for_q, other=1.0).to(tl.float32)
        scale *= tl.load(k_weight + first_column, mask=for_k, other=1.0).to(tl.float32)
        first *= inverse * scale
        scale = tl.load(q_weight + second_column, mask=for_q, other=1.0).to(tl.float32)
        scale *= tl.load(k_weight + second_column, mask=for_k, other=1.0).to(tl.float32)
        second *= inverse * scale
        if 2 * HALF < D:
            scale = tl.load(q_weight + kept_column, mask=is_query & has_kept, other=1.0).to(tl.float32)
            scale *= tl.load(k_weight + kept_column, mask=is_key & has_kept, other=1.0).to(tl.float32)
            kept *= inverse * scale

    angles = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + pair + head * 0
    cos = tl.load(angles, mask=turns & has_pair, other=1.0)
    sin = tl.load(angles + HALF, mask=turns & has_pair, other=0.0)

    slot = tl.load(slot_index + token)
    is_key = is_key & (slot >= 0)
    is_value = is_value & (slot >= 0)
    q_row = q_out + token * (H * D) + head * D
    k_row = k_cache + slot // PAGE * k_page_stride + slot % PAGE * k_token_stride + (head - H) * k_head_stride
    v_row = v_cache + slot // PAGE * v_page_stride + slot % PAGE * v_token_stride + (head - H - G) * v_head_stride
    kind = q_out.dtype.element_ty
    to_query, to_key, to_value = is_query & has_pair, is_key & has_pair, is_value & has_pair
    turned = (first * cos - second * sin).to(kind)
    _store(q_row, k_row, v_row, first_column, turned, to_query, to_key, to_value)
    turned = (second * cos + first * sin).to(kind)
    _store(q_row, k_row, v_row, second_column, turned, to_query, to_key, to_value)
    if 2 * HALF < D:
        to_query, to_key, to_value = is_query & has_kept, is_key & has_kept, is_value & has_kept
        _store(q_row, k_row, v_row, kept_column, kept.to(kind), to_query, to_key, to_value)


def rope_cache_triton(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_index: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
) -> torch.Tensor:
    """What `rope_cache` computes, on a GPU or in the interpreter; the same arguments and results."""
    tokens, width = qkv.shape
    page_size, num_kv_heads, head_size = k_cache.shape[1:]
    num_heads = width // head_size - 2 * num_kv_heads
    half = cos_sin.shape[2]
    q_out = torch.empty((tokens, num_heads, head_size), dtype=qkv.dtype, device=qkv.device)
    norm = "none" if q_norm is None else "head" if q_norm.numel() == head_size else "projection"
    grid = (tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))
    if tokens:
        _rope_cache[grid](
            qkv,
            positions,
            cos_sin,
            k_cache,
            v_cache,
            slot_index,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            q_out,
            eps,
            qkv.stride(0),
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
            H=num_heads,
            G=num_kv_heads,
            D=head_size,
            HALF=half,
            PAGE=page_size,
            NORM=norm,
            INTERLEAVED=interleaved,
            BLOCK_HEADS=HEADS_PER_PROGRAM,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_KEPT=triton.next_power_of_2(max(head_size - 2 * half, 1)),
            BLOCK_Q=triton.next_power_of_2(num_heads * head_size),
            BLOCK_K=triton.next_power_of_2(num_kv_heads * head_size),
            **overlap(qkv),
        )
    return q_out
