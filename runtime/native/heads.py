"""Attention split by heads: which heads a rank has, and which part of the checkpoint's tensors they are.

Shape legend: H query heads, G kv heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.native.families import DecoderShape
from runtime.native.weights import Part, Piece

# Tensors of a layer's attention that have something for every head, and the dimension in which they have it.
OF_QUERY_HEADS = {"q_proj.weight": 0, "q_proj.bias": 0, "o_proj.weight": 1, "sinks": 0}
OF_QUERY_HEADS |= {"q_b_proj.weight": 0, "kv_b_proj.weight": 0}  # of latent attention
OF_KV_HEADS = {"k_proj.weight": 0, "k_proj.bias": 0, "v_proj.weight": 0, "v_proj.bias": 0}


@dataclass(frozen=True)
class HeadShare:
    """One rank's heads.

    Attributes:
        rank: of all ranks.
        ranks: that share the heads; 1 where every rank has all of them.
        num_kv_heads: G of the whole model.
    """

    rank: int
    ranks: int
    num_kv_heads: int

    @staticmethod
    def choose(shape: DecoderShape, rank: int, world_size: int) -> HeadShare:
        """Split the heads evenly where that can be; ranks beyond the kv heads share these."""
        kv_heads = shape.num_kv_heads
        even = shape.num_heads % world_size == 0 and (
            shape.latent is not None or kv_heads % world_size == 0 or world_size % kv_heads == 0
        )
        split = even and shape.qk_norm != "projection"  # a norm over all heads wants all of them
        return HeadShare(rank, world_size, kv_heads) if split else HeadShare.whole(shape)

    @staticmethod
    def whole(shape: DecoderShape) -> HeadShare:
        """All heads."""
        return HeadShare(0, 1, shape.num_kv_heads)

    def shape_of(self, shape: DecoderShape) -> DecoderShape:
        """The decoder with this rank's heads alone."""
        if shape.latent is not None:
            return replace(shape, num_heads=shape.num_heads // self.ranks)
        kv_heads = max(1, shape.num_kv_heads // self.ranks)
        return replace(shape, num_heads=shape.num_heads // self.ranks, num_kv_heads=kv_heads)

    def part_of(self, part: Part) -> Part:
        """The part with this rank's piece of the checkpoint's tensor, whose size its destination has."""
        if self.ranks == 1 or ".self_attn." not in part.name:
            return part
        name = part.name.rsplit(".self_attn.", 1)[1]
        if name in OF_QUERY_HEADS:
            dimension, place, parts = OF_QUERY_HEADS[name], self.rank, self.ranks
        elif name in OF_KV_HEADS:
            parts = min(self.num_kv_heads, self.ranks)
            dimension, place = OF_KV_HEADS[name], self.rank * parts // self.ranks
        else:
            return part
        size = part.destination.shape[dimension]
        return replace(part, piece=Piece(dimension, place * size, parts * size))
