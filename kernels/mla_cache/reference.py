"""Plain-torch reference of the latent norm, rotary positions and cache write of multi-head latent attention."""

from __future__ import annotations

import torch

from kernels.rms_norm.reference import rms_norm
from kernels.rope_cache.reference import rotate, store


def mla_cache_reference(
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
    """What `mla_cache` computes, on any device; the same arguments and results."""
    size = norm.shape[0]
    cos, sin = cos_sin[positions.long()].unbind(1)
    key = rotate(latent[:, None, size:].float(), cos, sin, interleaved)[:, 0]
    store(torch.cat((rms_norm(latent[:, :size], norm, eps), key), dim=-1), cache, slot_index)
    q_rope.copy_(rotate(q_rope.float(), cos, sin, interleaved))
