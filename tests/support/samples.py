"""Small samples of routes for predictors."""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import RouteSample


def random_sample(
    num_tokens: int, *, num_layers: int = 4, num_experts: int = 6, top_k: int = 2, seed: int = 0
) -> RouteSample:
    """Uneven routes that depend on the layer, with token ids and a gate ahead that is often right."""
    generator = np.random.default_rng(seed)
    scores = generator.gumbel(size=(num_layers, num_experts)) + generator.gumbel(
        size=(num_tokens, num_layers, num_experts)
    )
    noisy = scores + generator.normal(size=scores.shape)
    experts, ahead = (np.argsort(-s, axis=-1)[..., :top_k].astype(np.uint8) for s in (scores, noisy))
    return RouteSample(experts, num_experts, generator.integers(0, 9, num_tokens, np.int32), ahead[:, 1:])


def chained_sample(num_tokens: int, *, num_layers: int = 4, num_experts: int = 8, seed: int = 0) -> RouteSample:
    """Deterministic chains, top-2: all layers follow from the first choice in the first layer, and so do token ids."""
    start = np.random.default_rng(seed).integers(0, num_experts, num_tokens)
    first = (start[:, None] + 3 * np.arange(num_layers)) % num_experts
    experts = np.stack([first, (first + 1) % num_experts], axis=-1).astype(np.uint8)
    return RouteSample(experts, num_experts, start.astype(np.int32), experts[:, 1:])
