"""Upper bounds on locality.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: Steps of the subgradient method per pair of layers.
STEPS = 100


def pair_bound(transitions: NDArray[np.integer], slots_per_gpu: Sequence[int], deadline: float = math.inf) -> int:
    """A number of transitions that no placement keeps more than, whatever its loads; copies that share evenly included.

    Each pair of adjacent layers alone. An expert meets at most as many experts of the other layer as the largest GPU
    holds: Σ_b x[a, b] ≤ s, Σ_a x[a, b] ≤ s, x ≤ 1. The Lagrangian of the second constraints, Σ_a (sum of the s largest
    of T[a, b] − u[b]) + s·Σ_b u[b], bounds it for every u ≥ 0; a subgradient method lowers it towards the optimum of
    the linear program. Copies: with all else fixed, locality is linear in an expert's shares, so some placement with
    one copy each, and at most as many experts on each GPU, keeps as much.

    Args:
        transitions: [L-1, E, E].
        slots_per_gpu: most experts on each GPU.
        deadline: on ``time.perf_counter()``; later the bound of the pairs left is taken at u = 0.
    """
    most = min(max(slots_per_gpu), transitions.shape[-1])
    bound = 0
    for counts in transitions:
        total = int(counts.sum())
        if most == transitions.shape[-1] or not total:
            bound += total
            continue
        values = counts.astype(np.float64)
        steps = STEPS if time.perf_counter() < deadline else 1
        relaxed = min(_lagrangian_bound(values, most, steps), _lagrangian_bound(values.T, most, 1))
        bound += min(total, math.floor(relaxed * (1 + 1e-9) + 1e-3))
    return bound


def _lagrangian_bound(values: NDArray[np.float64], most: int, steps: int) -> float:
    """The lowest value of the Lagrangian over some steps (Polyak's step length, towards a target slightly below)."""
    price = np.zeros(values.shape[1])
    best, patience, length = math.inf, 0, 0.1
    for _ in range(steps):
        reduced = values - price
        chosen = np.argpartition(-reduced, most - 1, axis=1)[:, :most]
        gained = np.maximum(np.take_along_axis(reduced, chosen, axis=1), 0.0)
        value = float(gained.sum() + most * price.sum())
        patience = 0 if value < best * (1 - 1e-5) else patience + 1
        best = min(best, value)
        if patience >= 5:
            length, patience = length / 2, 0
        meets = np.bincount(chosen[gained > 0], minlength=len(price))
        slope = most - meets
        if not (norm := float((slope**2).sum())):
            break
        price = np.maximum(0.0, price - length * value / norm * slope)
    return best
