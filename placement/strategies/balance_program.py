"""Balance: the least load of a layer's busiest GPU, with copies, by local search and an integer program.

Shape suffixes: E experts, G GPUs, M items (copies).
"""

from __future__ import annotations

import math
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
#: Larger integer programs do not pay: the search is closer to the optimum than they get.
MOST_BINARIES = 20_000


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
        settings: of the integer program.
        time_limit_s: of the integer program.
        most_copies: per expert; None for as many as fit.
        enough: a busiest load that need not be improved on; None for the least there is.
    """
    most = min(sum(1 for slots in slots_per_gpu if slots), 1 + sum(slots_per_gpu) - len(loads))
    most = min(most, most_copies or most)
    counts = copy_counts(loads, slots_per_gpu) if most > 1 else np.ones(len(loads), dtype=np.int64)
    mean = loads.sum() / len(slots_per_gpu)
    bound = max(mean, float(loads.max()) / most)
    bound = math.ceil(bound - 1e-9) if most == 1 else bound
    binaries = len(loads) * len(slots_per_gpu) * most
    if enough is not None and enough < bound:
        enough = None  # out of reach: the least is worth knowing
    tolerance = 0.0 if binaries <= SMALL_PROGRAM or enough is not None else GAP_TOLERANCE
    goal = bound + tolerance * mean if enough is None else enough
    rng = np.random.default_rng(settings.seed)
    packed = pack_layer(loads, counts, slots_per_gpu)
    gpus = search_balance(loads, packed, target=(bound + goal) / 2 if enough is None else goal, kicks=KICKS, rng=rng)
    busiest = busiest_load(loads, gpus)
    if busiest <= goal or binaries > MOST_BINARIES:
        return BalancedLayer(gpus, busiest, min(bound, busiest))
    model, holds = _balance_model(loads, slots_per_gpu, most)
    result = solve_model(model, settings, time_limit_s, gap_rel=tolerance / 5)
    if result.feasible:
        found = _gpus_of(holds, len(loads), len(slots_per_gpu))
        if found is not None and busiest_load(loads, found) < busiest:
            gpus, busiest = found, busiest_load(loads, found)
    # The solver's tolerances may put its bound a hair above the optimum; without copies loads are whole numbers.
    proven = result.bound * mean - 1e-6 * mean
    bound = min(busiest, max(bound, math.ceil(proven) if most == 1 and math.isfinite(proven) else proven))
    return BalancedLayer(gpus, busiest, bound, result.interrupted)


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
