"""Attention of one new token per sequence over a paged cache of latent vectors (multi-head latent attention, DeepSeek).

Shape legend: B sequences, H heads, C latent size, r rotated part.
"""

from __future__ import annotations

import torch

from kernels.mla_attention.reference import mla_attention_reference

__all__ = ["mla_attention", "mla_attention_reference"]


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from the last token of every sequence to the latent vectors of all of its tokens, itself included.

    The queries come multiplied by the key half of the up-projection, and the result still needs its value half: so
    every head reads the same C + r numbers per token, and keys and values are never expanded.

    Args:
        q_latent: queries in latent space ``[B, H, C]``, bfloat16, float16 or float32.
        q_rope: the rotated part of the queries ``[B, H, r]``, like ``q_latent``.
        cache: latent vector, then rotated key, of every token ``[pages, page_size, C + r]``, of the dtype of
            ``q_latent``.
        page_table: as in `decode_attention`, int32 ``[B, max_pages]``.
        lengths: tokens of each sequence in the cache, int32 ``[B]``; 0 for a row that is only padding.
        scale: factor of the scores.

    Returns:
        Weighted latent vectors ``[B, H, C]``, of the dtype of ``q_latent``; zeros where the length is 0.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """
    if q_latent.is_cuda:
        from kernels.mla_attention.kernel import mla_attention_triton

        return mla_attention_triton(q_latent, q_rope, cache, page_table, lengths, scale)
    return mla_attention_reference(q_latent, q_rope, cache, page_table, lengths, scale)
