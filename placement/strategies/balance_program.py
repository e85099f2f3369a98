"""Balance: the least load of a layer's busiest GPU, with copies, by local search and an integer program.

Shape suffixes: E experts, G GPUs, M items (copies).
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray

from placement.problem import SolverSettings
from placement.strategies.balance_search import busiest_load, search_balance
from placement.strategies.eplb import copy_counts, pack_layer
from placement.strategies.integer_program import solve_model

#: How close busiest load and bound must be, relative to the mean GPU's load, for the integer program to be left out.
GAP_TOLERANCE = 5e-4
#: Programs of at most this many binaries are solved to the end.
SMALL_PROGRAM = 64
#: Descents of the search that comes before.
KICKS = 200
#: Above SMALL_PROGRAM, an integer program pays only where the bound by counting is farther off than this.
PROGRAM_GAP = 0.01
#: Larger integer programs do not pay: the search is closer to the optimum than they get.
MOST_BINARIES = 2_000
#: Loads are multiples of 1 / lcm(1 … copies); beyond this denominator floats no longer tell neighbours apart.
LARGEST_DENOMINATOR = 10**6


@dataclass(frozen=True)
class BalancedLayer:
    """A layer's placement, its busiest GPU's load, and a load that no placement can go below."""

    gpus: list[list[int]]
    busiest: float
    bound: float
    interrupted: bool = False


def balance_layer(
    loads: NDArray[np.integer],
    slots_per_gpu: Sequence[int],
    settings: SolverSettings,
    time_limit_s: float,
    most_copies: int | None = None,
    enough: float | None = None,
) -> BalancedLayer:
    """Minimise the busiest GPU's load of one layer.

    Args:
        loads: int [E].
        slots_per_gpu: slots per GPU, in all at least E.
        settings: seed, and backend of the integer program.
        time_limit_s: for the search and the integer program together.
        most_copies: per expert; None for as many as fit, else 1.
        enough: a busiest load that need not be improved on; None for the least there is.
    """
    deadline = time.perf_counter() + time_limit_s
    most = min(sum(1 for slots in slots_per_gpu if slots), 1 + sum(slots_per_gpu) - len(loads))
    most = min(most, most_copies or most)
    counts = copy_counts(loads, slots_per_gpu) if most > 1 else np.ones(len(loads), dtype=np.int64)
    mean = loads.sum() / len(slots_per_gpu)
    bound = _round_up(least_busiest(loads, slots_per_gpu, most), most)
    binaries = len(loads) * len(slots_per_gpu) * most
    if enough is not None and enough < bound:
        enough = None  # out of reach: the least is worth knowing
    tolerance = 0.0 if binaries <= SMALL_PROGRAM else GAP_TOLERANCE
    goal = bound + tolerance * mean if enough is None else enough
    rng = np.random.default_rng(settings.seed)
    packed = pack_layer(loads, counts, slots_per_gpu)
    gpus = search_balance(loads, packed, (bound + goal) / 2 if enough is None else goal, KICKS, rng, deadline)
    if busiest_load(loads, packed) < busiest_load(loads, gpus):
        gpus = packed
    busiest = busiest_load(loads, gpus)
    left = deadline - time.perf_counter()
    near = enough is None and binaries > SMALL_PROGRAM and busiest <= bound * (1 + PROGRAM_GAP)
    if busiest <= goal or near or binaries > MOST_BINARIES or left <= 0:
        return BalancedLayer(gpus, busiest, min(bound, busiest))
    model, holds = _balance_model(loads, slots_per_gpu, most)
    result = solve_model(model, settings, left)
    if result.feasible:
        found = _gpus_of(holds, len(loads), len(slots_per_gpu))
        if found is not None and busiest_load(loads, found) < busiest:
            gpus, busiest = found, busiest_load(loads, found)
    if math.isfinite(result.bound):  # the solver's tolerances may put it a hair above the optimum
        bound = max(bound, _round_up(result.bound * mean - 1e-6 * mean, most))
    return BalancedLayer(gpus, busiest, min(bound, busiest), result.interrupted)


def least_busiest(loads: NDArray[np.integer], slots_per_gpu: Sequence[int], most: int) -> float:
    """A load that the busiest GPU of no placement goes below, by counting.

    Args:
        loads: int [E].
        slots_per_gpu: slots per GPU, in all at least E.
        most: copies that an expert may have.
    """
    mean = float(loads.sum() / len(slots_per_gpu))
    if sum(slots_per_gpu) == len(loads):
        return max(mean, _least_with_company(np.sort(loads)[::-1], slots_per_gpu))
    base = max(mean, float(loads.max()) / most)
    # A busiest load T needs at least load / T copies of each expert, and all copies together must have slots.
    shares = np.unique(loads[:, None] / np.arange(1, most + 1))
    candidates = [base, *shares[shares > base].tolist()]

    def fits(index: int) -> bool:
        copies = np.ceil(loads / max(candidates[index], 1e-12) - 1e-9).clip(1)
        return bool(copies.sum() <= sum(slots_per_gpu))

    return candidates[bisect_left(range(len(candidates) - 1), True, key=fits)]


def _least_with_company(falling: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> float:
    """The bound where every slot is full: whoever stands with the heaviest experts, it is somebody.

    Of the k heaviest, two share a GPU, or k GPUs hold one each, and all their other slots hold somebody else.

    Args:
        falling: int [E], loads from the heaviest to the lightest.
        slots_per_gpu: slots per GPU, in all E.
    """
    occupied = [slots for slots in slots_per_gpu if slots]
    others = min(occupied) - 1
    lightest = np.concatenate([[0], np.cumsum(falling[::-1])])
    least = 0.0
    for k in range(1, len(occupied) + 1):
        apart = (float(falling[:k].sum()) + lightest[k * others]) / k
        if others:
            # Some company of the k is at least the (k · others)-th lightest expert.
            apart = max(apart, float(falling[k - 1] + falling[len(falling) - k * others] + lightest[others - 1]))
        if k > 1:
            apart = min(apart, float(falling[k - 2] + falling[k - 1] + lightest[max(0, others - 1)]))
        least = max(least, apart)
    return least


def _round_up(load: float, most: int) -> float:
    """The next load that a GPU can have: whole loads divided by up to ``most`` copies share a denominator."""
    denominator = math.lcm(*range(1, most + 1))
    if denominator > LARGEST_DENOMINATOR:
        return load
    return math.ceil(load * denominator - 1e-6) / denominator


def _balance_model(
    loads: NDArray[np.integer], slots_per_gpu: Sequence[int], most: int
) -> tuple[pulp.LpProblem, dict[tuple[int, int, int], pulp.LpVariable]]:
    """The integer program of one layer; loads are relative to the mean GPU's."""
    # Data
    experts, gpus, numbers = range(len(loads)), range(len(slots_per_gpu)), range(1, most + 1)
    relative = loads / max(loads.sum() / len(slots_per_gpu), 1e-12)
    model = pulp.LpProblem("balance", pulp.LpMinimize)
    # Variables: expert e has n copies; and one of them stands on g. The load per copy is then a constant.
    has = {(e, n): pulp.LpVariable(f"has_{e}_{n}", cat="Binary") for e in experts for n in numbers}
    holds = {
        (e, g, n): pulp.LpVariable(f"holds_{e}_{g}_{n}", cat="Binary") for e in experts for g in gpus for n in numbers
    }
    busiest = pulp.LpVariable("busiest", lowBound=0)
    # Constraints
    for e in experts:
        model += pulp.lpSum(has[e, n] for n in numbers) == 1
        for n in numbers:
            model += pulp.lpSum(holds[e, g, n] for g in gpus) == n * has[e, n]
            if n > 1:
                for g in gpus:
                    model += holds[e, g, n] <= has[e, n]
    for g in gpus:
        model += pulp.lpSum(holds[e, g, n] for e in experts for n in numbers) <= slots_per_gpu[g]
        model += pulp.lpSum(relative[e] / n * holds[e, g, n] for e in experts for n in numbers) <= busiest
    # Objective
    model.setObjective(busiest + 0)
    return model, holds


def _gpus_of(
    holds: dict[tuple[int, int, int], pulp.LpVariable], num_experts: int, num_gpus: int
) -> list[list[int]] | None:
    """The placement in the model's variables, or None if it misses an expert."""
    gpus: list[list[int]] = [[] for _ in range(num_gpus)]
    for (e, g, _), variable in holds.items():
        if (variable.varValue or 0) > 0.5:
            gpus[g].append(e)
    return gpus if len(set().union(*gpus)) == num_experts else None
