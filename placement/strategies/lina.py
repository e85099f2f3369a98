"""Lina: copies in proportion to popularity, packed first-fit-decreasing, to balance token counts.

Source: Lina (its popularity-proportional allocation of GPUs to experts and its packing).

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import Slots, sorted_slots
from placement.strategies.eplb import make_room

#: A GPU may exceed its capacity by this share of it: loads are sums of rounded quotients.
ROUNDING = 1e-9


def solve_lina(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Lina's copies and packing on the popularity of the tokens solved on, whatever the objective.

    Lina estimates popularity anew for every batch, from the experts that its tokens chose in the layers before. A
    placement is made for all tokens to come, so popularity here is that of all tokens solved on.
    """
    started = time.perf_counter()
    slots = lina_slots(problem.statistics.popularity, problem.slots_per_gpu)
    return Solution.of(problem, slots, "lina", started)


def lina_slots(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> Slots:
    """Slots that balance expected loads under even sharing.

    Args:
        loads: [L, E], token–expert pairs.
        slots_per_gpu: slots of each GPU in every layer, in all at least E.

    Returns:
        Slots. A copy is left out where no GPU can take it; an expert that nobody chose has one copy.
    """
    return sorted_slots([pack_first_fit(row, proportional_copies(row, slots_per_gpu), slots_per_gpu) for row in loads])


def proportional_copies(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> NDArray[np.int64]:
    """Copies per expert, int64 [E], in proportion to loads.

    At least 1, at most one per GPU with slots, in all as many as there are slots (fewer where every expert that was
    chosen at all has the most). Rounded by largest remainder (ties: lower id).
    """
    num_gpus = sum(1 for slots in slots_per_gpu if slots)
    chosen = loads > 0
    budget = min(sum(slots_per_gpu), int(np.where(chosen, num_gpus, 1).sum()))
    if not chosen.any():
        return np.ones(len(loads), dtype=np.int64)
    # Copies per token, such that the clipped shares add up to the budget: the sum grows with it, so halve the interval.
    low, high = 0.0, num_gpus / float(loads[chosen].min())
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * loads, 1, num_gpus).sum() < budget:
            low = middle
        else:
            high = middle
    shares = np.clip(high * loads, 1, num_gpus)
    counts = np.floor(shares).astype(np.int64)
    for expert in np.argsort(counts - shares, kind="stable")[: budget - counts.sum()]:
        counts[expert] += 1
    return counts


def pack_first_fit(
    loads: NDArray[np.integer], counts: NDArray[np.integer], slots_per_gpu: Sequence[int]
) -> list[list[int]]:
    """Pack copies, heaviest first, each into the first GPU that has room for it below the mean load.

    Args:
        loads: [E], token–expert pairs.
        counts: [E], copies of each expert, at least 1 each and in all no more than there are slots.
        slots_per_gpu: slots of each GPU.

    Returns:
        Experts of each GPU. A copy that fits nowhere goes to the least loaded GPU with a free slot that lacks the
        expert; with uneven slots a copy that no GPU can take is left out, never an expert's only one.
    """
    weight = np.asarray(loads) / counts
    weights, copies = weight.tolist(), counts.tolist()
    capacity = float(loads.sum()) / sum(1 for slots in slots_per_gpu if slots) * (1 + ROUNDING)
    gpus: list[list[int]] = [[] for _ in slots_per_gpu]
    filled = [0.0] * len(gpus)
    for expert in np.argsort(-weight, kind="stable").tolist():
        for _ in range(copies[expert]):
            free = [gpu for gpu, held in enumerate(gpus) if len(held) < slots_per_gpu[gpu]]
            lacking = [gpu for gpu in free if expert not in gpus[gpu]]
            fitting = (gpu for gpu in lacking if filled[gpu] + weights[expert] <= capacity)
            target = next(fitting, min(lacking, key=lambda gpu: (filled[gpu], gpu), default=-1))
            if target < 0:
                target = make_room(expert, free, gpus, filled, weight)
            if target < 0:
                break
            gpus[target].append(expert)
            filled[target] += weights[expert]
    return gpus
