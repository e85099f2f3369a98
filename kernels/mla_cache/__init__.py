"""Norm of the latent vector, rotary positions, and the write into the paged latent cache (multi-head latent attention).

Shape legend: T tokens, H heads, C latent size, r rotated part, S positions of the table.
"""

from __future__ import annotations

import torch

from kernels.mla_cache.reference import mla_cache_reference

__all__ = ["mla_cache", "mla_cache_reference"]


def mla_cache(
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
    """Normalise latent vectors, rotate the shared key, store both, and rotate a part of the queries in place.

    Args:
        q_rope: the part of the queries to rotate ``[T, H, r]``, bfloat16, float16 or float32; rotated in place. May be
            a slice of wider heads, entries contiguous.
        latent: the compressed projection of each token, latent vector, then the key to rotate, ``[T, C + r]``, like
            ``q_rope``; rows contiguous.
        positions: integer ``[T]``, each in [0, S).
        cos_sin: cosines, then sines, of every position, float32 ``[S, 2, r / 2]``.
        cache: ``[pages, page_size, C + r]``, of the dtype of ``latent``; written in place.
        slot_index: ``page * page_size + offset``, int64 ``[T]``; -1 stores nothing.
        norm: scale of the RMSNorm of the latent vector ``[C]``.
        eps: added to its mean square.
        interleaved: rotate the pairs (2 i, 2 i + 1) rather than (i, i + r / 2).
    """
    if latent.is_cuda:
        from kernels.mla_cache.kernel import mla_cache_triton as implementation
    else:
        implementation = mla_cache_reference
    implementation(q_rope, latent, positions, cos_sin, cache, slot_index, norm, eps, interleaved=interleaved)
