"""Locality over a window: two adjacent layers re-assigned together, everything else fixed, as an integer program.

Shape suffixes: A experts of the first layer, B of the second, G GPUs of the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pulp
from numpy.typing import NDArray

from placement.problem import SolverSettings
from placement.strategies.integer_program import solve_model

Placement = dict[tuple[int, int], pulp.LpVariable]
Window = tuple[NDArray[np.intp], NDArray[np.intp]]


def solve_window(
    counts: NDArray[np.integer],
    gains: tuple[NDArray[np.float64], NDArray[np.float64]],
    sizes: Sequence[int],
    start: Window,
    settings: SolverSettings,
    time_limit_s: float,
) -> tuple[Window, bool, bool]:
    """Maximise the transitions kept within a window and towards its fixed neighbours.

    Args:
        counts: [A, B], transitions between the window's layers.
        gains: float64 [A, G] and [B, G], transitions kept with the fixed layers before and after, where an expert
            stands on a GPU.
        sizes: experts of each layer on each GPU.
        start: GPU of every expert in both layers, intp [A] and [B].
        settings, time_limit_s: of the integer program.

    Returns:
        GPU of every expert in both layers, at least as good as the start; whether it is proven optimal; and whether
        Ctrl-C ended the program.
    """
    model, first, second = _window_model(counts, gains, sizes, start)
    result = solve_model(model, settings, time_limit_s, gap_abs=0.9)
    best, value = start, _value(counts, gains, start)
    if result.feasible:
        found = _read(first, len(counts), len(sizes)), _read(second, counts.shape[1], len(sizes))
        kept = _value(counts, gains, found)
        if kept > value and all(np.bincount(gpu, minlength=len(sizes)).tolist() == list(sizes) for gpu in found):
            best, value = found, kept
    return best, -result.bound < value + 1, result.interrupted


def _window_model(
    counts: NDArray[np.integer],
    gains: tuple[NDArray[np.float64], NDArray[np.float64]],
    sizes: Sequence[int],
    start: Window,
) -> tuple[pulp.LpProblem, Placement, Placement]:
    """The program and its placement variables. A GPU's transitions are counted from both sides, which tightens it."""
    # Data
    gpus, layer_a, layer_b = range(len(sizes)), range(counts.shape[0]), range(counts.shape[1])
    most_a = [[int(row[:size].sum()) for size in sizes] for row in -np.sort(-counts, axis=1)]
    most_b = [[int(row[:size].sum()) for size in sizes] for row in -np.sort(-counts.T, axis=1)]
    count = counts.tolist()
    model = pulp.LpProblem("window", pulp.LpMinimize)
    # Variables: the expert stands on g; its transitions that g keeps, counted at the first and at the second layer.
    first = {(a, g): pulp.LpVariable(f"first_{a}_{g}", cat="Binary") for a in layer_a for g in gpus}
    second = {(b, g): pulp.LpVariable(f"second_{b}_{g}", cat="Binary") for b in layer_b for g in gpus}
    kept_a = {(a, g): pulp.LpVariable(f"kept_a_{a}_{g}", lowBound=0) for a in layer_a for g in gpus}
    kept_b = {(b, g): pulp.LpVariable(f"kept_b_{b}_{g}", lowBound=0) for b in layer_b for g in gpus}
    # Constraints
    for place, layer in (first, layer_a), (second, layer_b):
        for expert in layer:
            model += pulp.lpSum(place[expert, g] for g in gpus) == 1
        for g in gpus:
            model += pulp.lpSum(place[expert, g] for expert in layer) == sizes[g]
    for a, g in product(layer_a, gpus):
        model += kept_a[a, g] <= pulp.lpSum(count[a][b] * second[b, g] for b in layer_b if count[a][b])
        model += kept_a[a, g] <= most_a[a][g] * first[a, g]
    for b, g in product(layer_b, gpus):
        model += kept_b[b, g] <= pulp.lpSum(count[a][b] * first[a, g] for a in layer_a if count[a][b])
        model += kept_b[b, g] <= most_b[b][g] * second[b, g]
    for g in gpus:
        model += pulp.lpSum(kept_a[a, g] for a in layer_a) == pulp.lpSum(kept_b[b, g] for b in layer_b)
    # Objective
    towards = [(gains[0], first), (gains[1], second)]
    fixed = [-float(gain[expert, g]) * place[expert, g] for gain, place in towards for expert, g in place]
    model.setObjective(pulp.lpSum(fixed + [-kept_a[a, g] for a, g in kept_a]))
    _set_start(counts, start, (first, second), (kept_a, kept_b))
    return model, first, second


def _set_start(
    counts: NDArray[np.integer], start: Window, place: tuple[Placement, Placement], kept: tuple[Placement, Placement]
) -> None:
    same = start[0][:, None] == start[1][None, :]
    per_expert = (counts * same).sum(axis=1), (counts * same).sum(axis=0)
    for layer in range(2):
        for (expert, g), variable in place[layer].items():
            variable.setInitialValue(int(start[layer][expert] == g))
        for (expert, g), variable in kept[layer].items():
            variable.setInitialValue(int(per_expert[layer][expert]) if start[layer][expert] == g else 0)


def _read(place: Placement, num_experts: int, num_gpus: int) -> NDArray[np.intp]:
    values = [[place[expert, g].varValue or 0.0 for g in range(num_gpus)] for expert in range(num_experts)]
    return np.argmax(np.array(values), axis=1)


def _value(
    counts: NDArray[np.integer], gains: tuple[NDArray[np.float64], NDArray[np.float64]], window: Window
) -> float:
    """Transitions kept, a whole number."""
    first, second = window
    fixed = gains[0][np.arange(len(first)), first].sum() + gains[1][np.arange(len(second)), second].sum()
    return float(fixed + counts[first[:, None] == second[None, :]].sum())
