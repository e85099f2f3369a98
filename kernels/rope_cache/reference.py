"""Plain-torch reference of query/key norms, rotary positions and the cache write.

Shape legend: T tokens, H query heads, G key/value heads, d head size, r rotated part, S positions of the table.
"""

from __future__ import annotations

import torch

from kernels.rms_norm.reference import rms_norm


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first r entries of every head.

    Args:
        x: float32 ``[T, heads, d]``.
        cos: float32 ``[T, r / 2]``.
        sin: float32 ``[T, r / 2]``.
        interleaved: the pairs are (2 i, 2 i + 1) rather than (i, i + r / 2).

    Returns:
        float32 ``[T, heads, d]``; each rotated pair stays where it was.
    """
    half = cos.shape[-1]
    rotated, kept = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :half], rotated[..., half:]
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, kept), dim=-1)


def store(rows: torch.Tensor, cache: torch.Tensor, slot_index: torch.Tensor) -> None:
    """Write one row per token into a paged cache, in place.

    Args:
        rows: ``[T, …]``, rounded to the dtype of the cache.
        cache: ``[pages, page_size, …]``.
        slot_index: ``page * page_size + offset``, int64 ``[T]``; -1 stores nothing.
    """
    kept = slot_index >= 0
    slots = slot_index[kept]
    cache[slots // cache.shape[1], slots % cache.shape[1]] = rows[kept].to(cache.dtype)


def _normalise(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of ``[T, heads, d]`` head by head (weight ``[d]``) or over all heads together (``[heads d]``)."""
    if weight.numel() != heads.shape[2]:
        return rms_norm(heads.flatten(1), weight, eps).view(heads.shape)
    return rms_norm(heads, weight, eps)


def rope_cache_reference(
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
    """What `rope_cache` computes, on any device; the same arguments and results."""
    tokens = qkv.shape[0]
    num_kv_heads, head_size = k_cache.shape[2:]
    num_heads = qkv.shape[1] // head_size - 2 * num_kv_heads
    heads = qkv.float().view(tokens, num_heads + 2 * num_kv_heads, head_size)
    queries, keys, values = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        queries, keys = _normalise(queries, q_norm, eps), _normalise(keys, k_norm, eps)
    cos, sin = cos_sin[positions.long()].unbind(1)
    store(rotate(keys, cos, sin, interleaved), k_cache, slot_index)
    store(values, v_cache, slot_index)
    return rotate(queries, cos, sin, interleaved).to(qkv.dtype)
