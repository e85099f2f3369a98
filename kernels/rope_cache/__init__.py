"""Normalisation of queries and keys, rotary positions, and the write of new keys and values into the paged cache.

Shape legend: T tokens, H query heads, G key/value heads, d head size, r rotated part, S positions of the table.
"""

from __future__ import annotations

import torch

from kernels.rope_cache.reference import rope_cache_reference

__all__ = ["rope_cache", "rope_cache_reference"]


def rope_cache(
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
    """Normalise and rotate queries and keys, store keys and values, and return the queries.

    The number of query heads follows from the width of ``qkv`` and the shape of the caches.

    Args:
        qkv: the projections of each token, queries first, then keys, then values, ``[T, (H + 2 G) d]``, bfloat16,
            float16 or float32, rows contiguous.
        positions: integer ``[T]``, each in [0, S).
        cos_sin: cosines, then sines, of every position, with any scaling in them, float32 ``[S, 2, r / 2]``. The first
            r entries of a head are rotated (r ≤ d, even), the others kept.
        k_cache: paged keys ``[pages, page_size, G, d]``, of the dtype of ``qkv``; written in place.
        v_cache: paged values, like ``k_cache``; written in place.
        slot_index: where each token is stored, ``page * page_size + offset``, int64 ``[T]``; -1 stores nothing.
        q_norm: scale of an RMSNorm of the queries before the rotation: ``[d]`` normalises head by head, ``[H d]`` the
            whole projection (OLMoE); None does not normalise.
        k_norm: the same for the keys, ``[d]`` or ``[G d]``; given exactly where ``q_norm`` is, and of the same kind.
        eps: added to the mean square of those norms.
        interleaved: rotate the pairs (2 i, 2 i + 1) rather than (i, i + r / 2).

    Returns:
        The rotated queries ``[T, H, d]``, of the dtype of ``qkv``. All arithmetic is float32, rounded once.
    """
    if qkv.is_cuda:
        from kernels.rope_cache.kernel import rope_cache_triton as implementation
    else:
        implementation = rope_cache_reference
    return implementation(
        qkv,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        slot_index,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        interleaved=interleaved,
    )
