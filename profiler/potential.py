"""How much locality a trace offers: a quick placement by affinity, judged on sequences it did not see.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np

from profiler.affinity_groups import assignment_sweeps, greedy_chain
from profiler.profile import LocalityPotential

NUM_GPUS = (2, 4, 8)
NUM_STARTS = 8


def locality_potentials(
    solved_LEE: np.ndarray, judged_LEE: np.ndarray, judged_popularity_LE: np.ndarray, seed: int = 0
) -> tuple[LocalityPotential, ...]:
    """Locality by number of GPUs, of those that divide the experts.

    Args:
        solved_LEE: int64 ``[L-1, E, E]``, affinity to place by; at least two layers.
        judged_LEE: int64 ``[L-1, E, E]``, affinity to judge on, not all zero.
        judged_popularity_LE: int64 ``[L, E]``, of the tokens judged on.
        seed: of the starts of the search.
    """
    num_experts = judged_LEE.shape[1]
    return tuple(
        _potential(num_gpus, solved_LEE.astype(np.float64), judged_LEE, judged_popularity_LE, seed)
        for num_gpus in NUM_GPUS
        if num_experts % num_gpus == 0 and num_experts > num_gpus
    )


def _potential(
    num_gpus: int, solved_LEE: np.ndarray, judged_LEE: np.ndarray, popularity_LE: np.ndarray, seed: int
) -> LocalityPotential:
    num_layers, num_experts = popularity_LE.shape
    generator = np.random.default_rng(seed)
    sizes = [num_experts // num_gpus] * num_gpus
    contiguous_E = np.repeat(np.arange(num_gpus), sizes)
    starts = [contiguous_E, *(generator.permutation(contiguous_E) for _ in range(NUM_STARTS - 1))]
    placements = [assignment_sweeps(solved_LEE, greedy_chain(solved_LEE, sizes, start), sizes) for start in starts]
    best_LE = max(placements, key=lambda placed_LE: kept_share(solved_LEE, placed_LE))
    loads = [np.bincount(gpus, counts, num_gpus) for gpus, counts in zip(best_LE, popularity_LE, strict=True)]
    return LocalityPotential(
        num_gpus=num_gpus,
        kept=kept_share(judged_LEE, best_LE),
        contiguous=kept_share(judged_LEE, np.tile(contiguous_E, (num_layers, 1))),
        max_load=max(float(load.max() / load.mean()) for load in loads),
    )


def kept_share(affinity_LEE: np.ndarray, gpu_LE: np.ndarray) -> float:
    """Share of the pairs of adjacent layers whose experts stand on one GPU.

    Args:
        affinity_LEE: counts ``[L-1, E, E]``, not all zero.
        gpu_LE: integer ``[L, E]``.
    """
    same_LEE = gpu_LE[:-1, :, None] == gpu_LE[1:, None, :]
    return float(affinity_LEE[same_LEE].sum() / affinity_LEE.sum())
