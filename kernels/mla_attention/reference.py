"""Plain-torch reference of decode attention over latent vectors.

Shape legend: B sequences, H heads, C latent size, r rotated part, N longest context of the batch.
"""

from __future__ import annotations

import torch

from kernels.decode_attention.reference import gather_pages, visible_tokens


def mla_attention_reference(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `mla_attention` computes, on any device; the same arguments and results. Synchronises."""
    longest = int(lengths.max()) if len(lengths) else 0
    if longest == 0:
        return torch.zeros_like(q_latent)
    visible = visible_tokens(lengths, longest, None)
    keys = gather_pages(cache, page_table, longest).float().masked_fill(~visible[..., None], 0)
    queries = torch.cat((q_latent, q_rope), dim=-1).float()
    scores = torch.einsum("bhc,bnc->bhn", queries, keys) * scale
    weights = torch.softmax(scores.masked_fill(~visible[:, None], -torch.inf), dim=-1).nan_to_num()
    return torch.einsum("bhn,bnc->bhc", weights, keys[..., : q_latent.shape[-1]]).to(q_latent.dtype)
