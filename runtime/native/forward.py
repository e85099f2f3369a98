"""The decoder's layers: one pass over tokens, the same for prefill and decode but for how they attend.

Shape legend: T tokens, K choices per token, D model width, H query heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kernels.norm_linear import norm_linear
from kernels.permute import Permutation
from kernels.rms_norm import add_rms_norm
from kernels.rope_cache import rope_cache
from kernels.route import Routes
from kernels.skinny_linear import skinny_linear
from runtime.load import SlotCounter
from runtime.native.cache import PagedCache
from runtime.native.experts import gated_mlp, moe_layer
from runtime.native.families import DecoderShape
from runtime.native.mla import LatentCache, latent_queries
from runtime.native.ranks import Ranks
from runtime.native.weights import DecoderWeights

# layer, rotated queries [T, H, d] -> values [T, H, …]
Attend = Callable[[int, torch.Tensor], torch.Tensor]
# layer, the router's choice and the pairs of every slot -> what is used instead
ReplaceRoutes = Callable[[int, Routes, Permutation], tuple[Routes, Permutation]]
# layer, the experts that the router chose for this rank's rows, int32 [T, K] -> what is used instead
ReplaceIds = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class Decoder:
    """A model on this rank.

    Attributes:
        shape: its parameters.
        weights: in the operators' layout.
        cache: of keys and values, or of latent vectors.
        rotary: float32 ``[positions, 2, r/2]`` for r rotated entries of a head.
        replace_routes: for measurements and tests: called with every MoE layer's number, its routes and
            their permutation.
        replace_ids: the same where ranks have rows of their own; called with every MoE layer's number and experts.
        ranks: that the layers are shared with; None where this one has all.
        load: counts the pairs of every slot, where that is wanted.
        kept_routes: where it is a list, every MoE layer adds the routes of the pass's tokens.
    """

    shape: DecoderShape
    weights: DecoderWeights
    cache: PagedCache | LatentCache
    rotary: torch.Tensor
    replace_routes: ReplaceRoutes | None = None
    replace_ids: ReplaceIds | None = None
    ranks: Ranks | None = None
    load: SlotCounter | None = None
    kept_routes: list[Routes] | None = None

    @contextmanager
    def keep_routes(self) -> Iterator[list[Routes]]:
        """While entered, the list that every MoE layer adds its routes to."""
        kept: list[Routes] = []
        self.kept_routes = kept
        try:
            yield kept
        finally:
            self.kept_routes = None


def run_layers(
    decoder: Decoder,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    slot_index: torch.Tensor,
    attend: Attend,
    decoding: bool = False,
) -> torch.Tensor:
    """Feed tokens through all layers; their keys and values go into the cache.

    Args:
        decoder: the model.
        tokens: ids, int64 ``[T]``.
        positions: int32 ``[T]``.
        slot_index: where each token is cached, ``page * page_size + offset``, int64 ``[T]``; -1 caches nothing.
        attend: attention over the cache.
        decoding: whether this is a decode step, for the counts of active experts.

    Returns:
        Hidden states after the last norm ``[T, D]``.
    """
    shape, weights = decoder.shape, decoder.weights
    layers = weights.layers
    residual, normed = add_rms_norm(weights.embedding[tokens], None, layers[0].input_norm, shape.eps)
    for number, layer in enumerate(layers):
        q = _queries(decoder, number, normed, positions, slot_index)
        attended = skinny_linear(attend(number, q).flatten(1), layer.output, layer.output_bias)
        next_norm = layers[number + 1].input_norm if number + 1 < len(layers) else weights.norm
        residual, normed = _feed_forward(decoder, number, attended, residual, next_norm, slot_index)
    if decoder.load is not None:
        marked = decoder.ranks is not None and decoder.ranks.splits_rows  # padding has no slots
        decoder.load.end_pass(decoding, None if marked else slot_index)
    return normed


def _queries(
    decoder: Decoder, number: int, normed: torch.Tensor, positions: torch.Tensor, slot_index: torch.Tensor
) -> torch.Tensor:
    """A layer's rotated queries ``[T, H, d]``; what its tokens are attended to by goes into the cache."""
    shape, layer, cache = decoder.shape, decoder.weights.layers[number], decoder.cache
    if isinstance(cache, LatentCache):
        return latent_queries(shape, layer, normed, positions, decoder.rotary, cache.latents[number], slot_index)
    return rope_cache(
        skinny_linear(normed, layer.qkv, layer.qkv_bias),
        positions,
        decoder.rotary,
        cache.keys[number],
        cache.values[number],
        slot_index,
        q_norm=layer.q_norm,
        k_norm=layer.k_norm,
        eps=shape.eps,
    )


def _feed_forward(
    decoder: Decoder,
    number: int,
    attended: torch.Tensor,
    residual: torch.Tensor,
    next_norm: torch.Tensor,
    slot_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows a layer's attention: the residual and the next layer's norm, both ``[T, D]``."""
    layer, eps, ranks = decoder.weights.layers[number], decoder.shape.eps, decoder.ranks
    if layer.experts is None:
        assert layer.mlp is not None
        add = add_rms_norm if ranks is None else ranks.finish_attention
        residual, normed = add(attended, residual, layer.mlp_norm, eps)
        return add_rms_norm(gated_mlp(normed, layer.mlp), residual, next_norm, eps)
    experts, dtype = layer.experts, torch.float32 if decoder.shape.routing.float32 else None
    if ranks is not None and ranks.share.ranks > 1:
        residual, normed = ranks.finish_attention(attended, residual, layer.mlp_norm, eps)
        logits = skinny_linear(normed, experts.router, experts.router_bias, dtype)
    else:
        residual, normed, logits = norm_linear(
            attended, residual, layer.mlp_norm, eps, experts.router, experts.router_bias, dtype
        )
    return moe_layer(decoder, number, normed, logits, slot_index, residual, next_norm)
