"""Locality as an integer program.

Source: ExFlow (its placement program over tokens); here transitions are aggregated into counts per pair of experts,
and products of placements are linearised tightly, neither of which changes the optimum.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pulp
from numpy.typing import NDArray

from placement.problem import SolverSettings
from placement.strategies.integer_program import MipResult, solve_model

#: More products of two placements than this, and the program ends near a random placement: it is not tried.
MOST_PRODUCTS = 40_000


def is_tractable(num_layers: int, num_experts: int, num_gpus: int) -> bool:
    """Whether the integer program is small enough to be worth its time."""
    return (num_layers - 1) * num_experts**2 * num_gpus <= MOST_PRODUCTS


def solve_locality_program(
    transitions: NDArray[np.integer],
    loads: NDArray[np.integer],
    sizes: Sequence[int],
    load_limits: NDArray[np.float64] | None,
    start: NDArray[np.integer],
    settings: SolverSettings,
    time_limit_s: float,
) -> tuple[NDArray[np.intp] | None, int | None, MipResult]:
    """Maximise the transitions kept with one copy of each expert.

    Args:
        transitions: [L-1, E, E].
        loads: [L, E].
        sizes: experts on each GPU.
        load_limits: [L], the most load of a GPU in each layer, or None.
        start: [L, E], a placement to start from (HiGHS only).
        settings, time_limit_s: of the integer program.

    Returns:
        The placement found, intp [L, E] or None; a number of transitions that no placement exceeds, or None.
    """
    model, place, both = _locality_model(transitions, loads, sizes, load_limits)
    start = _relabel(start, sizes)
    for (layer, e, g), variable in place.items():
        variable.setInitialValue(int(start[layer, e] == g))
    for (layer, a, b, g), variable in both.items():
        variable.setInitialValue(int(start[layer, a] == g and start[layer + 1, b] == g))
    result = solve_model(model, settings, time_limit_s, gap_abs=0.9)
    bound = None if math.isinf(result.bound) else math.floor(-result.bound + 1e-3)
    found = np.array(
        [
            [max(range(len(sizes)), key=lambda g: place[layer, e, g].varValue or 0.0) for e in range(loads.shape[1])]
            for layer in range(len(loads))
        ],
        dtype=np.intp,
    )
    return (found if result.feasible else None), bound, result


def _locality_model(
    transitions: NDArray[np.integer],
    loads: NDArray[np.integer],
    sizes: Sequence[int],
    load_limits: NDArray[np.float64] | None,
) -> tuple[
    pulp.LpProblem, dict[tuple[int, int, int], pulp.LpVariable], dict[tuple[int, int, int, int], pulp.LpVariable]
]:
    """The program, its placement variables and its product variables."""
    # Data
    layers, experts, gpus = range(len(loads)), range(loads.shape[1]), range(len(sizes))
    model = pulp.LpProblem("locality", pulp.LpMinimize)
    # Variables: expert e of layer l stands on g; and so does expert b of the next layer.
    place = {
        (layer, e, g): pulp.LpVariable(f"place_{layer}_{e}_{g}", cat="Binary")
        for layer in layers
        for e in experts
        for g in gpus
    }
    both = {
        (layer, a, b, g): pulp.LpVariable(f"both_{layer}_{a}_{b}_{g}", lowBound=0, upBound=1)
        for layer in layers[:-1]
        for a in experts
        for b in experts
        for g in gpus
    }
    # Constraints
    for layer in layers:
        for e in experts:
            model += pulp.lpSum(place[layer, e, g] for g in gpus) == 1
        for g in gpus:
            model += pulp.lpSum(place[layer, e, g] for e in experts) == sizes[g]
            if load_limits is not None:
                load = pulp.lpSum(int(loads[layer, e]) * place[layer, e, g] for e in experts)
                model += load <= float(load_limits[layer])
    for layer in layers[:-1]:
        for g in gpus:
            for e in experts:
                # An expert on g meets exactly the experts of the other layer that are on g.
                model += pulp.lpSum(both[layer, e, b, g] for b in experts) == sizes[g] * place[layer, e, g]
                model += pulp.lpSum(both[layer, a, e, g] for a in experts) == sizes[g] * place[layer + 1, e, g]
        for a, b in product(experts, experts):
            model += pulp.lpSum(both[layer, a, b, g] for g in gpus) <= 1
    if len(set(sizes)) == 1:
        for e in experts[: len(gpus)]:  # equal GPUs are interchangeable: name them in the order of layer 0
            for g in gpus[e + 1 :]:
                model += place[0, e, g] == 0
    # Objective
    model.setObjective(pulp.lpSum(-int(transitions[layer, a, b]) * both[layer, a, b, g] for layer, a, b, g in both))
    return model, place, both


def _relabel(gpu: NDArray[np.integer], sizes: Sequence[int]) -> NDArray[np.intp]:
    """The same placement with GPUs named in the order in which layer 0's experts use them, if all are equal."""
    if len(set(sizes)) > 1:
        return gpu.astype(np.intp)
    order = list(dict.fromkeys(gpu[0].tolist()))
    order += [g for g in range(len(sizes)) if g not in order]
    return np.argsort(order)[gpu]
