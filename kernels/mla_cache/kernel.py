"""Triton kernel of the latent norm, rotary positions and cache write: one program per token.

Shape legend: T tokens, H heads, C latent size, r rotated part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap


@triton.jit
def _mla_cache(
    q_rope,
    latent,
    positions,
    cos_sin,
    cache,
    slot_index,
    norm,
    eps,
    q_token_stride,
    q_head_stride,
    latent_stride,
    page_stride,
    entry_stride,
    H: tl.constexpr,
    C: tl.constexpr,
    HALF: tl.constexpr,  # r / 2
    PAGE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column, pair, head = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_H)[:, None]
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + HALF
    scale = tl.load(norm + column, mask=column < C, other=0.0).to(tl.float32)
    kind = q_rope.dtype.element_ty
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + pair
    cos = tl.load(angles, mask=pair < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0)

    inside = (head < H) & (pair < HALF)[None, :]
    source = q_rope + token * q_token_stride + head * q_head_stride
    left = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(source + first[None, :], (left * cos[None, :] - right * sin[None, :]).to(kind), mask=inside)
    tl.store(source + second[None, :], (right * cos[None, :] + left * sin[None, :]).to(kind), mask=inside)

    slot = tl.load(slot_index + token)
    if slot >= 0:
        row = latent + token * latent_stride
        entry = cache + slot // PAGE * page_stride + slot % PAGE * entry_stride
        value = tl.load(row + column, mask=column < C, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, axis=0) / C + eps)
        tl.store(entry + column, (value * inverse * scale).to(kind), mask=column < C)
        key_left = tl.load(row + C + first, mask=pair < HALF, other=0.0).to(tl.float32)
        key_right = tl.load(row + C + second, mask=pair < HALF, other=0.0).to(tl.float32)
        tl.store(entry + C + first, (key_left * cos - key_right * sin).to(kind), mask=pair < HALF)
        tl.store(entry + C + second, (key_right * cos + key_left * sin).to(kind), mask=pair < HALF)


def mla_cache_triton(
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    slot_index: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    *,
    interleaved: bool = True,
) -> None:
    """What `mla_cache` computes, on a GPU or in the interpreter; the same arguments and results."""
    tokens, num_heads, rotated = q_rope.shape
    if tokens:
        _mla_cache[(tokens,)](
            q_rope,
            latent,
            positions,
            cos_sin,
            cache,
            slot_index,
            norm,
            eps,
            *q_rope.stride()[:2],
            latent.stride(0),
            *cache.stride()[:2],
            H=num_heads,
            C=norm.shape[0],
            HALF=rotated // 2,
            PAGE=cache.shape[1],
            INTERLEAVED=interleaved,
            BLOCK_H=triton.next_power_of_2(num_heads),
            BLOCK_C=triton.next_power_of_2(norm.shape[0]),
            BLOCK_HALF=triton.next_power_of_2(rotated // 2),
            **overlap(latent),
        )
