"""Clusters of experts with even loads, one layer alone, as an integer program.

Source: MoETuner (its first program: least sum of deviations from the mean load).

Shape suffixes: E experts, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray

from placement.problem import SolverSettings
from placement.strategies.balance_search import descend
from placement.strategies.eplb import pack_layer
from placement.strategies.integer_program import solve_model

#: Relative gap at which the program may stop.
GAP = 0.025
#: So may it where the deviations add up to this share of all load: a relative gap never closes around zero.
NEGLIGIBLE = 2.5e-4
#: With less time per binary, the program has never found anything better than greedy packing and swaps.
LEAST_S_PER_BINARY = 1e-4


@dataclass(frozen=True)
class Clusters:
    """Clusters of one layer.

    Attributes:
        experts: of each cluster.
        proven: whether the deviation is proven to be within the gap of the least.
        interrupted: whether Ctrl-C ended the program.
    """

    experts: list[list[int]]
    proven: bool
    interrupted: bool = False


def balanced_clusters(
    loads: NDArray[np.integer], sizes: Sequence[int], settings: SolverSettings, time_limit_s: float
) -> Clusters:
    """Minimise the sum over clusters of |load − mean load|.

    Args:
        loads: int [E].
        sizes: experts of each cluster, in all E.
        settings, time_limit_s: of the integer program, which is left out where greedy packing and swaps are even, and
            where the time is too short for its size.
    """
    start = descend(loads, pack_layer(loads, np.ones(len(loads), dtype=np.int64), sizes))
    value = deviation(loads, start)
    negligible = NEGLIGIBLE * len(sizes)
    if value <= negligible:
        return Clusters(start, proven=True)
    if time_limit_s < LEAST_S_PER_BINARY * len(loads) * len(sizes):
        return Clusters(start, proven=False)
    model, holds = _clusters_model(loads, sizes, start)
    result = solve_model(model, settings, time_limit_s, gap_rel=GAP, gap_abs=negligible)
    best = start
    if result.feasible:
        clusters: list[list[int]] = [[] for _ in sizes]
        for (e, c), variable in holds.items():
            if (variable.varValue or 0) > 0.5:
                clusters[c].append(e)
        # Found within the solver's tolerances, so checked.
        whole = sorted(e for held in clusters for e in held) == list(range(len(loads)))
        if whole and [len(held) for held in clusters] == list(sizes) and deviation(loads, clusters) < value:
            best, value = clusters, deviation(loads, clusters)
    # The solver's own measure of the gap is relative to the value; its bound is within tolerances, too.
    proven = value - result.bound <= max(negligible, GAP * value) * (1 + 1e-6)
    return Clusters(best, proven, result.interrupted)


def deviation(loads: NDArray[np.integer], clusters: Sequence[Sequence[int]]) -> float:
    """Sum over clusters of |load − mean load|, relative to the mean load; 0 where there is no load."""
    mean = loads.sum() / len(clusters)
    return float(sum(abs(loads[held].sum() - mean) for held in map(list, clusters)) / mean) if mean else 0.0


def _clusters_model(
    loads: NDArray[np.integer], sizes: Sequence[int], start: Sequence[Sequence[int]]
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:
    """The program and its variables; loads are relative to the mean cluster's."""
    # Data
    clusters, by_load = range(len(sizes)), np.argsort(-loads, kind="stable").tolist()
    relative = (loads / (loads.sum() / len(sizes))).tolist()
    cluster_of = {e: c for c, held in enumerate(start) for e in held}
    alike = len(set(sizes)) == 1
    if alike:  # equal clusters are interchangeable: name them in the order in which the heaviest experts use them
        order = {c: index for index, c in enumerate(dict.fromkeys(cluster_of[e] for e in by_load))}
        cluster_of = {e: order[c] for e, c in cluster_of.items()}
    model = pulp.LpProblem("clusters", pulp.LpMinimize)
    # Variables: expert e is in cluster c; what a cluster's load exceeds the mean by.
    holds = {(e, c): pulp.LpVariable(f"holds_{e}_{c}", cat="Binary") for e in by_load for c in clusters}
    excess = {c: pulp.LpVariable(f"excess_{c}", lowBound=0) for c in clusters}
    # Constraints
    for e in by_load:
        model += pulp.lpSum(holds[e, c] for c in clusters) == 1
    for c in clusters:
        load = pulp.lpSum(relative[e] * holds[e, c] for e in by_load)
        model += pulp.lpSum(holds[e, c] for e in by_load) == sizes[c]
        model += load - excess[c] <= 1
        excess[c].setInitialValue(max(0.0, sum(relative[e] for e in by_load if cluster_of[e] == c) - 1))
    for (e, c), variable in holds.items():
        variable.setInitialValue(int(cluster_of[e] == c))
    if alike:
        for rank, e in enumerate(by_load[: len(sizes)]):
            for c in clusters[rank + 1 :]:
                model += holds[e, c] == 0
    # Objective: loads above the mean and below it add up to the same, so the deviation is twice the excess.
    model.setObjective(pulp.lpSum(2 * excess[c] for c in clusters))
    return model, holds
