"""Small routing problems in memory, for tests of placement."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from profiler.statistics import RoutingStatistics, count_pairs
from profiler.trace_format import TraceWriter


def make_routes(seed: int, num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> np.ndarray:
    """Routes [T, L, K] with skewed popularity and affinity between layers."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(4, size=num_tokens)
    taste = rng.gumbel(size=(4, num_layers, num_experts)) * 2
    score = taste[topic] + rng.gumbel(size=(num_tokens, num_layers, num_experts))
    return np.argsort(-score, axis=2)[:, :, :top_k]


def count_routes(routes: np.ndarray, num_experts: int) -> RoutingStatistics:
    """Statistics of routes in memory."""
    layers = routes.swapaxes(0, 1)
    pairs = list(pairwise(layers))
    empty = np.zeros((0, num_experts, num_experts), dtype=np.int64)
    return RoutingStatistics(
        num_tokens=len(routes),
        popularity=np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in layers]),
        top1_popularity=np.stack([np.bincount(layer[:, 0], minlength=num_experts) for layer in layers]),
        affinity=np.stack([count_pairs(a, b, num_experts) for a, b in pairs]) if pairs else empty,
        top1_affinity=np.stack([count_pairs(a[:, :1], b[:, :1], num_experts) for a, b in pairs]) if pairs else empty,
        coactivation=np.stack([count_pairs(layer, layer, num_experts) for layer in layers]),
    )


def write_routes(path: Path, routes: np.ndarray, num_experts: int, tokens_per_sequence: int = 20, **metadata) -> Path:
    """Write routes [T, L, K] as a trace of sequences of equal length."""
    num_layers, top_k = routes.shape[1:]
    with TraceWriter(
        path,
        model="test-model",
        num_experts=num_experts,
        layer_ids=list(range(num_layers)),
        top_k=top_k,
        weights=False,
        token_ids=False,
        **metadata,
    ) as writer:
        for start in range(0, len(routes), tokens_per_sequence):
            part = routes[start : start + tokens_per_sequence]
            writer.add_sequence(part, decode=np.ones(len(part), dtype=np.uint8))
    return path
