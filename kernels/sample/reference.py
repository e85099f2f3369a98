"""Plain-torch reference of sampling, and the hash behind its noise.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch

MIN_TEMPERATURE = 1e-5
WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B1


def mix(x: torch.Tensor) -> torch.Tensor:
    """Spread the bits of 32-bit words, given and returned in int64 (the finaliser of MurmurHash3)."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise of every (seed, position, token).

    Args:
        seeds: int64 ``[B]``.
        positions: integer ``[B]``.
        vocabulary: V.

    Returns:
        float32 ``[B, V]``, between -3.1 and 22.9.
    """
    seeds = seeds.long()
    key = mix((seeds & WORD) ^ GOLDEN)
    key = mix(key ^ ((seeds >> 32) & WORD))
    key = mix(key ^ (positions.long() & WORD))[:, None]
    token = torch.arange(vocabulary, device=seeds.device)[None]
    bits = mix(mix((token * GOLDEN + key) & WORD) ^ key)
    uniform = (bits.float() + 0.5) * 2.0**-32
    # -log(1 - u), which a plain logarithm would round to 0 for the small u that make the greatest noise.
    waiting_time = torch.where(uniform < 2.0**-10, uniform + 0.5 * uniform * uniform, -torch.log(1 - uniform))
    return -torch.log(waiting_time.clamp(max=22.0))


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `sample` computes, on any device; the same arguments and results."""
    scaled = logits.float() / temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    noisy = scaled + gumbel_noise(seeds, positions, logits.shape[1])
    if top_p is not None:
        ordered, order = torch.softmax(scaled.double(), dim=-1).sort(dim=-1, descending=True, stable=True)
        likelier = ordered.cumsum(-1) - ordered
        outside = (likelier >= top_p[:, None]) & (likelier > 0) & (top_p < 1)[:, None]
        noisy = noisy.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return torch.where((temperature == 0)[:, None], logits.float(), noisy).argmax(dim=-1)
