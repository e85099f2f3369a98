"""Seeded synthetic routing with what real traces show: skewed popularity, affinity between layers, and noise.

Every token has a topic. In every layer a topic prefers some experts, drawn for that layer alone, on top of a popularity
that falls by Zipf's law; a share of choices ignores both. A token's K experts are drawn without replacement.

Shape suffixes: T tokens, L layers, E experts, K choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from profiler.statistics import RoutingStatistics, count_pairs


@dataclass(frozen=True)
class SyntheticRouting:
    """What to generate.

    Attributes:
        num_layers, num_experts, top_k: L, E, K.
        num_tokens: T.
        num_topics: topics, themselves of falling frequency.
        topic_strength: standard deviation of a topic's log-preference for an expert.
        zipf: exponent of the popularity of experts; 0 for none.
        noise: share of an expert's probability that is the same for all experts.
        seed: of everything.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_tokens: int
    num_topics: int = 16
    topic_strength: float = 1.5
    zipf: float = 0.5
    noise: float = 0.2
    seed: int = 0

    def routes(self) -> NDArray[np.int16]:
        """Experts of every token, int16 [T, L, K], the likeliest draws first."""
        rng = np.random.default_rng(self.seed)
        frequency = 1.0 / np.arange(1, self.num_topics + 1)
        topic_T = rng.choice(self.num_topics, size=self.num_tokens, p=frequency / frequency.sum())
        popularity_E = np.arange(1, self.num_experts + 1) ** -self.zipf
        routes_TLK = np.empty((self.num_tokens, self.num_layers, self.top_k), dtype=np.int16)
        for layer in range(self.num_layers):
            taste = rng.standard_normal((self.num_topics, self.num_experts)) * self.topic_strength
            weight = rng.permutation(popularity_E) * np.exp(taste)
            weight /= weight.sum(axis=1, keepdims=True)
            weight = (1 - self.noise) * weight + self.noise / self.num_experts
            # The K smallest of exponential variables with these rates are K draws without replacement, in their order.
            arrival_TE = rng.standard_exponential((self.num_tokens, self.num_experts), dtype=np.float32)
            arrival_TE /= weight.astype(np.float32)[topic_T]
            first_TK = np.argpartition(arrival_TE, self.top_k - 1, axis=1)[:, : self.top_k]
            order_TK = np.argsort(np.take_along_axis(arrival_TE, first_TK, axis=1), axis=1)
            routes_TLK[:, layer] = np.take_along_axis(first_TK, order_TK, axis=1)
        return routes_TLK


def count_routes(routes_TLK: NDArray[np.integer], num_experts: int) -> RoutingStatistics:
    """Statistics of routes in memory, [T, L, K]."""
    layers = [np.ascontiguousarray(routes_TLK[:, layer], dtype=np.intp) for layer in range(routes_TLK.shape[1])]
    empty = np.zeros((0, num_experts, num_experts), dtype=np.int64)
    pairs = list(pairwise(layers))
    return RoutingStatistics(
        num_tokens=len(routes_TLK),
        popularity=np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in layers]),
        top1_popularity=np.stack([np.bincount(layer[:, 0], minlength=num_experts) for layer in layers]),
        affinity=np.stack([count_pairs(a, b, num_experts) for a, b in pairs]) if pairs else empty,
        top1_affinity=np.stack([count_pairs(a[:, :1], b[:, :1], num_experts) for a, b in pairs]) if pairs else empty,
        coactivation=np.stack([count_pairs(layer, layer, num_experts) for layer in layers]),
    )


#: 32 layers of 8 experts: small enough for the exact dynamic program.
SMALL = SyntheticRouting(num_layers=32, num_experts=8, top_k=2, num_tokens=8000, num_topics=8)
#: The shape of Qwen3-30B-A3B.
MIDDLE = SyntheticRouting(num_layers=48, num_experts=128, top_k=8, num_tokens=20000)
#: The shape of DeepSeek-V3.
LARGE = SyntheticRouting(num_layers=58, num_experts=256, top_k=8, num_tokens=20000)
