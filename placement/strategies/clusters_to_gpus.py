"""Clusters to GPUs, layer by layer: the slowest pair of GPUs at every boundary of layers carries as little as possible.

Source: MoETuner (its second program: traffic between GPUs over bandwidth, the maximum per boundary, summed).

The cost of a boundary is the largest traffic / bandwidth over all pairs of different GPUs; the traffic from GPU g to h
is the number of transitions from g's cluster in one layer to h's cluster in the next.

Shape suffixes: L layers, C clusters, G GPUs (as many as clusters).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from placement.problem import SolverSettings
from placement.strategies.integer_program import solve_model

Placement = dict[tuple[int, int, int], pulp.LpVariable]


@dataclass(frozen=True)
class Fabric:
    """The links between GPUs.

    Attributes:
        per_node: GPUs of a node.
        intra, inter: time per transition within a node and between nodes, in any one unit.
        allowed: bool [C, G], whether a GPU has room for a cluster.
    """

    per_node: int
    intra: float
    inter: float
    allowed: NDArray[np.bool_]

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Time per transition from GPU to GPU, float64 [G, G]; 0 on the diagonal."""
        gpus = np.arange(self.allowed.shape[1])
        node = gpus // self.per_node
        times = np.where(node[:, None] == node[None, :], self.intra, self.inter)
        times[gpus, gpus] = 0.0
        return times


def boundary_costs(
    traffic: NDArray[np.integer], gpus: NDArray[np.intp], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cost of every boundary, float64 [L-1], from traffic [L-1, C, C] and the GPU of every cluster [L, C]."""
    return np.array(
        [(t * seconds[a[:, None], b]).max() for t, a, b in zip(traffic, gpus, gpus[1:], strict=False)], dtype=np.float64
    )


def assign_forwards(traffic: NDArray[np.integer], fabric: Fabric) -> NDArray[np.intp]:
    """Every layer optimally given the one before, cluster c of the first layer on GPU c: intp [L, C].

    Among the optimal assignments of a layer, one with the least traffic in all is taken. On one node with equal
    clusters this is optimal for the sum: renaming the GPUs from some layer on changes that one boundary alone.
    """
    seconds, num_clusters = fabric.seconds, len(fabric.allowed)
    gpus = np.tile(np.arange(num_clusters), (len(traffic) + 1, 1))
    for layer, counts in enumerate(traffic):
        times = counts[:, :, None] * seconds[gpus[layer]][:, None, :]  # [C before, C, G]
        worst = np.where(fabric.allowed, times.max(axis=0), np.inf)
        limit = _bottleneck(worst)
        total = times.sum(axis=0)
        gpus[layer + 1] = linear_sum_assignment(np.where(worst <= limit, total, num_clusters * (total.max() + 1)))[1]
    return gpus


def _bottleneck(worst: NDArray[np.float64]) -> float:
    """The least maximum of an assignment's entries, of a matrix [C, G] with infinity where none is allowed."""
    values = np.unique(worst[np.isfinite(worst)])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        over = worst > values[middle]
        rows, columns = linear_sum_assignment(over)
        low, high = (middle + 1, high) if over[rows, columns].any() else (low, middle)
    return float(values[low])


def assign_window(
    traffic: NDArray[np.integer],
    gpus: NDArray[np.intp],
    window: range,
    fabric: Fabric,
    settings: SolverSettings,
    time_limit_s: float,
) -> tuple[NDArray[np.intp], bool, bool]:
    """Re-assign all layers of a window together by integer program, the layers before and after fixed.

    Args:
        traffic: [L-1, C, C].
        gpus: GPU of every cluster, intp [L, C].
        window: adjacent layers; all of them is the whole program.
        fabric: links.
        settings, time_limit_s: of the integer program.

    Returns:
        GPU of every cluster, intp [L, C], at least as good; whether the window is proven optimal; and whether Ctrl-C
        ended the program.
    """
    seconds = fabric.seconds
    touched = slice(max(window[0] - 1, 0), window[-1] + 1)  # boundaries
    before = float(boundary_costs(traffic, gpus, seconds)[touched].sum())
    if before == 0:
        return gpus, True, False
    scale = (touched.stop - touched.start) / before
    model, place = _window_model(traffic.astype(np.float64) * scale, gpus, window, fabric)
    result = solve_model(model, settings, time_limit_s, gap_rel=1e-6)
    best, cost = gpus, before
    if result.feasible:
        found = gpus.copy()
        for (layer, c, g), variable in place.items():
            if (variable.varValue or 0) > 0.5:
                found[layer, c] = g
        whole = all(sorted(found[layer].tolist()) == list(range(len(fabric.allowed))) for layer in window)
        after = float(boundary_costs(traffic, found, seconds)[touched].sum())
        if whole and after < cost * (1 - 1e-9):
            best, cost = found, after
    return best, result.bound / scale >= cost * (1 - 1e-5), result.interrupted


def _window_model(
    traffic: NDArray[np.float64], gpus: NDArray[np.intp], window: range, fabric: Fabric
) -> tuple[pulp.LpProblem, Placement]:
    """The program, its start, and its placement variables.

    A pair of clusters costs nothing on one GPU, ``intra`` on one node and ``inter`` elsewhere, so that it takes only
    products for "on this GPU, both" and "on this node, both", not one for every pair of GPUs.
    """
    # Data
    clusters, seconds = range(len(fabric.allowed)), fabric.seconds
    nodes = [range(start, start + fabric.per_node) for start in range(0, len(clusters), fabric.per_node)]
    model = pulp.LpProblem("clusters_to_gpus", pulp.LpMinimize)
    # Variables: cluster c of a layer stands on g; the slowest pair of each boundary.
    place = {
        (layer, c, g): pulp.LpVariable(f"place_{layer}_{c}_{g}", 0, int(fabric.allowed[c, g]), cat="Integer")
        for layer in window
        for c in clusters
        for g in clusters
    }
    for (layer, c, g), variable in place.items():
        variable.setInitialValue(int(gpus[layer, c] == g))
    boundaries = range(max(window[0] - 1, 0), min(window[-1] + 1, len(traffic)))
    slowest = {boundary: pulp.LpVariable(f"slowest_{boundary}", lowBound=0) for boundary in boundaries}
    # Constraints
    for layer in window:
        for k in clusters:
            model += pulp.lpSum(place[layer, k, g] for g in clusters) == 1
            model += pulp.lpSum(place[layer, c, k] for c in clusters) == 1
    for boundary, variable in slowest.items():
        counts = traffic[boundary]
        variable.setInitialValue(float((counts * seconds[gpus[boundary][:, None], gpus[boundary + 1]]).max()))
        if boundary not in window:
            fixed = (counts[:, :, None] * seconds[gpus[boundary]][:, None, :]).max(axis=0)
            _add_fixed_neighbour(model, variable, place, boundary + 1, fixed)
        elif boundary + 1 not in window:
            fixed = (counts.T[:, :, None] * seconds[:, gpus[boundary + 1]].T[:, None, :]).max(axis=0)
            _add_fixed_neighbour(model, variable, place, boundary, fixed)
        else:
            same_gpu = _add_together(model, place, gpus, boundary, "gpu", [range(g, g + 1) for g in clusters])
            same_node = _add_together(model, place, gpus, boundary, "node", nodes) if len(nodes) > 1 else None
            for c in clusters:
                for d in clusters:
                    near = pulp.lpSum(same_node[c, d]) if same_node else 1
                    time = fabric.inter * (1 - near) + fabric.intra * (near - pulp.lpSum(same_gpu[c, d]))
                    model += float(counts[c, d]) * time <= variable
    # Objective
    model.setObjective(pulp.lpSum(slowest.values()))
    return model, place


def _add_fixed_neighbour(
    model: pulp.LpProblem, slowest: pulp.LpVariable, place: Placement, layer: int, times: NDArray[np.float64]
) -> None:
    """The boundary between a layer of the window and a fixed one: times [C, G] of a cluster's slowest pair on a GPU."""
    clusters = range(len(times))
    for k in clusters:
        model += pulp.lpSum(float(times[k, g]) * place[layer, k, g] for g in clusters) <= slowest
        model += pulp.lpSum(float(times[c, k]) * place[layer, c, k] for c in clusters) <= slowest


def _add_together(
    model: pulp.LpProblem, place: Placement, gpus: NDArray[np.intp], layer: int, name: str, groups: list[range]
) -> dict[tuple[int, int], list[pulp.LpVariable]]:
    """For clusters c of a layer and d of the next: variables per group of GPUs, 1 where both stand in it."""
    clusters = range(gpus.shape[1])
    both = {
        (c, d, m): pulp.LpVariable(f"same_{name}_{layer}_{c}_{d}_{m}", lowBound=0, upBound=1)
        for c in clusters
        for d in clusters
        for m in range(len(groups))
    }
    for (c, d, m), variable in both.items():
        variable.setInitialValue(int(gpus[layer, c] in groups[m] and gpus[layer + 1, d] in groups[m]))
    for m, group in enumerate(groups):
        for k in clusters:
            here = pulp.lpSum(place[layer, k, g] for g in group)
            there = pulp.lpSum(place[layer + 1, k, g] for g in group)
            # A cluster of the group meets as many clusters there as the group has GPUs; another one meets none.
            model += pulp.lpSum(both[k, d, m] for d in clusters) == len(group) * here
            model += pulp.lpSum(both[c, k, m] for c in clusters) == len(group) * there
    return {(c, d): [both[c, d, m] for m in range(len(groups))] for c in clusters for d in clusters}
