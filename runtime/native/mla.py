"""Multi-head latent attention (DeepSeek): one latent vector per token is cached, and heads are projections of it.

Prompts expand keys and values from the cache, a few heads at a time. Decoding never does: the projection of the keys is
applied to the query instead, that of the values to the result.

Shape legend: T tokens, B rows of a decode step, N sequences, L new tokens of each, S tokens of each in the cache after
them, H heads, C latent size, n plain and r rotated entries of a head's query, v of its value.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kernels.head_linear import head_linear
from kernels.mla_attention import mla_attention
from kernels.mla_cache import mla_cache
from kernels.rms_norm import add_rms_norm
from kernels.skinny_linear import skinny_linear
from runtime.native.deepseek import NORM_EPS
from runtime.native.families import DecoderShape
from runtime.native.prefill_attention import EXPANDED, prefill_attention
from runtime.native.weights import LayerWeights


class LatentCache:
    """Latent vectors and rotated keys of all layers, in pages as in `runtime.native.cache.PagedCache`.

    Args:
        shape: of the decoder.
        num_pages: pages per layer.
        page_size: tokens per page.
        dtype: of the cache.
        device: of the cache.

    Attributes:
        latents: per layer ``[pages, page size, C + r]``.
    """

    def __init__(
        self, shape: DecoderShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert shape.latent is not None
        size = (shape.num_layers, num_pages, page_size, shape.latent.entry)
        self.latents = list(torch.zeros(size, dtype=dtype, device=device))
        self.page_size = page_size

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return int(self.latents[0].shape[0]) * self.page_size


def latent_queries(
    shape: DecoderShape,
    layer: LayerWeights,
    normed: torch.Tensor,
    positions: torch.Tensor,
    rotary: torch.Tensor,
    cache: torch.Tensor,
    slot_index: torch.Tensor,
) -> torch.Tensor:
    """A layer's queries ``[T, H, n + r]``, the last r entries rotated; the tokens' latent vectors go into the cache.

    Args:
        shape: of the decoder.
        layer: its weights.
        normed: hidden states ``[T, D]``.
        positions: int32 ``[T]``.
        rotary: float32 ``[positions, 2, r/2]``.
        cache: of this layer ``[pages, page size, C + r]``.
        slot_index: int64 ``[T]``; -1 caches nothing.
    """
    latent = shape.latent
    assert latent is not None
    assert layer.k_norm is not None
    inputs = skinny_linear(normed, layer.qkv)
    queries, entries = inputs[:, : -latent.entry], inputs[:, -latent.entry :]
    if layer.q_up is not None:
        assert layer.q_norm is not None
        queries = skinny_linear(add_rms_norm(queries.contiguous(), None, layer.q_norm, NORM_EPS)[1], layer.q_up)
    q = queries.unflatten(1, (-1, latent.query))
    rotated = q[..., latent.plain :]
    mla_cache(
        rotated,
        entries,
        positions,
        rotary,
        cache,
        slot_index,
        layer.k_norm,
        NORM_EPS,
        interleaved=latent.interleaved,
    )
    return q


def attend_rows(
    shape: DecoderShape,
    layer: LayerWeights,
    q: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Attend from the last token of every row to all of its tokens, ``[B, H, v]``.

    Args:
        shape: of the decoder.
        layer: its weights.
        q: of `latent_queries` ``[B, H, n + r]``.
        cache: of this layer ``[pages, page size, C + r]``.
        page_table: int32 ``[B, max_pages]``.
        lengths: tokens of each row in the cache, int32 ``[B]``.
    """
    latent = shape.latent
    assert latent is not None
    assert layer.kv_up is not None
    plain, rotated = q.split([latent.plain, latent.rotated], dim=2)
    keys_up, values_up = layer.kv_up.split([latent.plain, latent.value_size], dim=1)
    attended = mla_attention(head_linear(plain, keys_up), rotated, cache, page_table, lengths, latent.scale)
    return head_linear(attended, values_up.transpose(1, 2))


def attend_prompts(shape: DecoderShape, layer: LayerWeights, q: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Attend causally from each sequence's last L tokens to all of its S tokens, ``[N, L, H, v]``.

    Args:
        shape: of the decoder.
        layer: its weights.
        q: of `latent_queries` ``[N, L, H, n + r]``.
        entries: from the cache ``[N, S, C + r]``.
    """
    latent = shape.latent
    assert latent is not None
    assert layer.kv_up is not None
    vectors, shared_key = entries.split([latent.size, latent.rotated], dim=2)
    vectors = vectors.contiguous()
    at_once = max(1, EXPANDED // (entries[..., 0].numel() * (latent.query + latent.value_size)))  # heads
    attended = []
    for queries, up in zip(q.split(at_once, dim=2), layer.kv_up.split(at_once), strict=True):
        expanded = linear(vectors, up.flatten(0, 1)).unflatten(2, up.shape[:2])
        plain, values = expanded.split([latent.plain, latent.value_size], dim=3)
        keys = torch.cat([plain, shared_key[:, :, None].expand(-1, -1, len(up), -1)], dim=3)
        attended.append(prefill_attention(queries, keys, values, latent.scale, None, None))
    return torch.cat(attended, dim=2)
