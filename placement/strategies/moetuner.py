"""MoETuner: clusters of experts with even loads first, then clusters to GPUs so that the slowest traffic is least.

Source: MoETuner (its two integer programs). Where the second program is too large for all layers at once, it is solved
for one layer at a time with the others fixed, until nothing gains.

Shape suffixes: L layers, E experts, C clusters, G GPUs (as many as clusters).
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import share_experts, sorted_slots
from placement.strategies.clusters_program import balanced_clusters
from placement.strategies.clusters_to_gpus import Fabric, assign_forwards, assign_window, boundary_costs

#: Share of the time for the first program.
CLUSTERS_SHARE = 0.5
#: More products of two placements than this, and the second program ends where it started: it is solved in windows.
MOST_PRODUCTS = 1000
#: An integer program is not worth starting with less time.
LEAST_S = 0.05
INTERRUPTED = "interrupted: this is the best placement found until then"


def solve_moetuner(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Even clusters, then little traffic between GPUs, from all K×K choices of the tokens solved on.

    One copy each, an equal share of the experts on each GPU (with uneven slots: in proportion); spare slots stay empty.
    """
    problem.require_affinity("strategy moetuner")
    started = time.perf_counter()
    notes: list[str] = []
    deadline = started + settings.time_limit_s
    clusters = _clusters(problem, settings, progress, started + CLUSTERS_SHARE * settings.time_limit_s, notes)
    gpus = _gpus(problem, clusters, settings, progress, deadline, notes)
    placed = [[layer[c] for c in np.argsort(of_cluster)] for layer, of_cluster in zip(clusters, gpus, strict=True)]
    return Solution.of(problem, sorted_slots(placed), "moetuner", started, notes=tuple(dict.fromkeys(notes)))


def _clusters(
    problem: PlacementProblem, settings: SolverSettings, progress: Progress, deadline: float, notes: list[str]
) -> list[list[list[int]]]:
    """Experts of every cluster in every layer; cluster c has the size that GPU c holds."""
    sizes = share_experts(problem.num_experts, problem.slots_per_gpu)
    layers, proven = [], 0
    for index, loads in enumerate(problem.statistics.popularity):
        left = (deadline - time.perf_counter()) / (problem.num_layers - index)
        solved = balanced_clusters(loads, sizes, settings, 0.0 if INTERRUPTED in notes else left)
        layers.append(solved.experts)
        proven += solved.proven
        if solved.interrupted:
            notes.append(INTERRUPTED)
    progress(f"moetuner: clusters of {problem.num_layers} layers, {proven} proven even within the gap")
    if proven < problem.num_layers:
        notes.append(
            f"the time limit left clusters of {problem.num_layers - proven} layers without proof of being even"
        )
    return layers


def _gpus(
    problem: PlacementProblem,
    clusters: list[list[list[int]]],
    settings: SolverSettings,
    progress: Progress,
    deadline: float,
    notes: list[str],
) -> NDArray[np.intp]:
    """GPU of every cluster, intp [L, C]."""
    traffic, fabric = _traffic(problem, clusters), _fabric(problem)
    gpus = assign_forwards(traffic, fabric)
    cost = boundary_costs(traffic, gpus, fabric.seconds).sum()
    progress(f"moetuner: slowest traffic {cost:.4g}")
    if fabric.per_node == problem.num_gpus and len(set(share_experts(problem.num_experts, problem.slots_per_gpu))) == 1:
        return gpus  # optimal
    per_boundary = problem.num_gpus**2 * (problem.num_gpus + problem.num_gpus // fabric.per_node)
    whole = len(traffic) * per_boundary <= MOST_PRODUCTS
    for width in (problem.num_layers, 1) if whole else (1,):
        gpus, optimal = _improve_windows(traffic, gpus, width, fabric, settings, deadline, notes)
        progress(f"moetuner: slowest traffic {boundary_costs(traffic, gpus, fabric.seconds).sum():.4g}")
        if optimal and width == problem.num_layers:
            break
    return gpus


def _improve_windows(
    traffic: NDArray[np.int64],
    gpus: NDArray[np.intp],
    width: int,
    fabric: Fabric,
    settings: SolverSettings,
    deadline: float,
    notes: list[str],
) -> tuple[NDArray[np.intp], bool]:
    """Windows of some adjacent layers, forwards and back, until a pass gains nothing; and whether all are optimal."""
    last = len(gpus) - width
    order = [*range(last + 1), *range(last - 1, -1, -1)]
    settled: set[int] = set()  # windows that are optimal as long as nothing around them changes
    gained = True
    while gained:
        gained = False
        for index, start in enumerate(order):
            if start in settled:
                continue
            left = deadline - time.perf_counter()
            if left < LEAST_S or INTERRUPTED in notes:
                notes.append("the windows over layers were cut off before nothing more was gained")
                return gpus, False
            limit_s = left / (len(order) - index + 1)
            window = range(start, start + width)
            found, optimal, interrupted = assign_window(traffic, gpus, window, fabric, settings, limit_s)
            if interrupted:
                notes.append(INTERRUPTED)
            elif not optimal:
                notes.append("the time limit left some windows over layers without proof")
            if found is not gpus:
                gained = True
                gpus = found
                settled -= set(range(start - width, start + width + 1))
            if optimal:
                settled.add(start)
    return gpus, len(settled) == last + 1


def _traffic(problem: PlacementProblem, clusters: list[list[list[int]]]) -> NDArray[np.int64]:
    """Transitions from cluster to cluster of the next layer, int64 [L-1, C, C]."""
    members = np.zeros((problem.num_layers, problem.num_gpus, problem.num_experts), dtype=np.int64)
    for layer, held in enumerate(clusters):
        for cluster, experts in enumerate(held):
            members[layer, cluster, experts] = 1
    traffic: NDArray[np.int64] = members[:-1] @ problem.statistics.affinity @ members[1:].swapaxes(1, 2)
    return traffic


def _fabric(problem: PlacementProblem) -> Fabric:
    """Relative times of the cluster's links; all equal where no cluster is given."""
    sizes = np.array(share_experts(problem.num_experts, problem.slots_per_gpu))
    allowed = sizes[:, None] <= np.array(problem.slots_per_gpu)[None, :]
    inter = 1.0
    if problem.cluster is not None and problem.cluster.nodes > 1:
        inter = problem.cluster.intra_node.bytes_per_s / problem.cluster.inter_node.bytes_per_s
    return Fabric(problem.gpus_per_node, 1.0, inter, allowed)
