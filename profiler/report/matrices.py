"""Large matrices of shares, small enough to stand in a page: 8 bits per entry, deflated, base64."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from profiler.statistics import RoutingStatistics

LEVELS = 255


def encode_matrix(shares: np.ndarray) -> dict[str, float | str]:
    """Quantise shares on a square-root scale, which keeps small ones apart.

    Args:
        shares: float64 ``[E, E']``, at least 0.

    Returns:
        ``scale`` (the largest share) and ``data``; entry = scale · (level / 255)², off by at most scale / 255.
    """
    scale = float(shares.max(initial=0.0))
    levels = np.rint(np.sqrt(shares / scale) * LEVELS) if scale > 0 else np.zeros(shares.shape)
    return {"scale": scale, "data": base64.b64encode(zlib.compress(levels.astype(np.uint8).tobytes())).decode()}


def next_layer_shares(statistics: RoutingStatistics, layer: int) -> np.ndarray:
    """Of the tokens that chose a at this layer, the share that chose b at the next: float64 ``[E, E]``, 0 if none."""
    return _per_token(statistics.affinity[layer], statistics.popularity[layer])


def same_layer_shares(statistics: RoutingStatistics, layer: int) -> np.ndarray:
    """Of the tokens that chose a at this layer, the share that chose b as well: float64 ``[E, E]``, diagonal 0."""
    others = statistics.coactivation[layer].copy()
    np.fill_diagonal(others, 0)
    return _per_token(others, statistics.popularity[layer])


def _per_token(pairs_EE: np.ndarray, tokens_E: np.ndarray) -> np.ndarray:
    return pairs_EE / np.maximum(tokens_E, 1)[:, None]
