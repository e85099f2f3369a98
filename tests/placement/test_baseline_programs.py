"""ExFlow and MoETuner: their programs against brute force, and what holds where they are solved in windows."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots
from placement.strategies import exflow as exflow_module
from placement.strategies import solve
from placement.strategies.clusters_program import GAP, NEGLIGIBLE, balanced_clusters, deviation
from placement.strategies.clusters_to_gpus import Fabric, assign_forwards, assign_window, boundary_costs
from placement.strategies.window_program import solve_window
from profiler.affinity_groups import assignment_sweeps
from tests.support.placement_problems import cluster_of, random_statistics

QUICK = SolverSettings(time_limit_s=20.0)
TOP1 = Objective("locality", "top1")


def all_layers(sizes):
    """Every way to put experts on GPUs of these sizes, one copy each."""
    labels = [gpu for gpu, size in enumerate(sizes) for _ in range(size)]
    return [np.array(row) for row in sorted(set(permutations(labels)))]


def kept(transitions, rows):
    return sum(int(c[a[:, None] == b[None, :]].sum()) for c, a, b in zip(transitions, rows, rows[1:], strict=False))


# ExFlow


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (3, 1), (2, 1, 1)]))
def test_exflow_is_optimal_on_tiny_problems(seed, slots):
    problem = PlacementProblem(random_statistics(seed, 3, 4), slots, TOP1)
    transitions = problem.statistics.top1_affinity
    best = max(kept(transitions, rows) for rows in product(all_layers(slots), repeat=3))
    solution = solve("exflow", problem, QUICK)
    assert solution.value == pytest.approx(best / transitions.sum())
    assert solution.optimal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exflow_module, "is_tractable", lambda *sizes: False)
        windows = solve("exflow", problem, QUICK)
    assert windows.bound is None
    start = np.tile(np.repeat(np.arange(len(slots)), slots), (3, 1))
    swept = kept(transitions, assignment_sweeps(transitions, start, slots))
    assert swept / transitions.sum() - 1e-12 <= windows.value <= solution.value + 1e-12


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["highs", "cbc"]), st.sampled_from([(2, 2), (2, 1, 1), (4, 0)]))
def test_a_window_is_solved_exactly(seed, backend, sizes):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, (4, 4))
    gains = tuple(rng.integers(0, 50, (4, len(sizes))).astype(float) for _ in range(2))
    rows = all_layers(sizes)

    def value(first, second):
        return (
            kept([counts], [first, second]) + gains[0][np.arange(4), first].sum() + gains[1][np.arange(4), second].sum()
        )

    best = max(value(first, second) for first, second in product(rows, rows))
    start = rows[0], rows[-1]
    found, optimal, _ = solve_window(counts, gains, sizes, start, SolverSettings(backend=backend), 20.0)
    assert value(*found) == best
    assert optimal
    assert [np.bincount(gpu, minlength=len(sizes)).tolist() for gpu in found] == [list(sizes)] * 2


def test_windows_escape_where_single_layers_are_stuck():
    """Two layers that hold each other in place, between layers that the next ones hold in place."""
    groups = np.kron(np.eye(2, dtype=np.int64), np.ones((2, 2), dtype=np.int64))
    transitions = np.stack([groups * count for count in (100, 20, 30, 20, 100)])
    stuck = np.tile([0, 0, 1, 1], (6, 1))
    stuck[2:4] = 1 - stuck[2:4]
    assert np.array_equal(assignment_sweeps(transitions, stuck, (2, 2)), stuck)
    search = exflow_module._ExFlow(QUICK, lambda line: None, np.inf)
    freed = search._improve_windows(transitions, (2, 2), stuck, np.inf)
    assert kept(transitions, freed) == transitions.sum()


def test_windows_of_some_gpus_keep_sizes_and_never_lose(monkeypatch):
    monkeypatch.setattr(exflow_module, "MOST_WINDOW_PRODUCTS", 50)
    transitions = random_statistics(1, 4, 8).top1_affinity
    sizes = (3, 2, 2, 1)
    start = np.tile(np.repeat(np.arange(4), sizes), (4, 1))
    search = exflow_module._ExFlow(QUICK, lambda line: None, np.inf)
    found = search._improve_windows(transitions, sizes, start, np.inf)
    assert exflow_module._gpus_per_window(sizes) == 2
    assert [np.bincount(row).tolist() for row in found] == [list(sizes)] * 4
    assert kept(transitions, found) > kept(transitions, start)


def test_exflow_minimises_moves_between_nodes_first():
    problem = PlacementProblem(random_statistics(5, 3, 4), (1, 1, 1, 1), TOP1, cluster=cluster_of(2, 2))
    transitions = problem.statistics.top1_affinity
    solution = solve("exflow", problem, QUICK)
    gpu = np.array([[gpu for e in range(4) for gpu in range(4) if e in layer[gpu]] for layer in solution.slots])
    chains = [np.array(rows) for rows in product(all_layers((1, 1, 1, 1)), repeat=3)]
    within_nodes = max(kept(transitions, rows // 2) for rows in chains)
    assert kept(transitions, gpu // 2) == within_nodes
    same_nodes = [rows for rows in chains if np.array_equal(rows // 2, gpu // 2)]
    assert kept(transitions, gpu) == max(kept(transitions, rows) for rows in same_nodes)
    assert solution.bound is None


@pytest.mark.parametrize(
    ("objective", "slots"),
    [
        (Objective("balance"), (2, 2)),
        (Objective("locality"), (2, 2)),
        (TOP1, (3, 3)),
        (replace(TOP1, max_load=2), (2, 2)),
    ],
)
def test_exflow_gives_no_bound_on_what_its_program_does_not_bound(objective, slots):
    assert solve("exflow", PlacementProblem(random_statistics(0, 3, 4), slots, objective), QUICK).bound is None


def test_exflow_stops_at_its_time_limit():
    problem = PlacementProblem(random_statistics(0, 8, 32), (8,) * 4, TOP1)
    solution = solve("exflow", problem, SolverSettings(time_limit_s=0.3))
    assert solution.seconds < 5
    assert any("cut off" in note for note in solution.notes)


# MoETuner


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=6, max_size=6), st.sampled_from([(2, 2, 2), (3, 3), (3, 2, 1), (4, 2, 0)]))
def test_clusters_are_even_within_the_gap(loads, sizes):
    loads = np.array(loads)
    found = balanced_clusters(loads, sizes, QUICK, 20.0)
    assert [len(held) for held in found.experts] == list(sizes)
    assert sorted(e for held in found.experts for e in held) == list(range(6))
    rows = all_layers(sizes)
    least = min(deviation(loads, [np.flatnonzero(row == c).tolist() for c in range(len(sizes))]) for row in rows)
    value = deviation(loads, found.experts)
    assert found.proven
    assert value - least <= max(NEGLIGIBLE * len(sizes), GAP * value) + 1e-6


def least_cost(traffic, seconds):
    orders = [np.array(order) for order in permutations(range(len(seconds)))]
    chains = product(orders, repeat=len(traffic) + 1)
    return min(boundary_costs(traffic, np.array(rows), seconds).sum() for rows in chains)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_clusters_forwards_are_optimal_on_one_node(seed):
    traffic = np.random.default_rng(seed).integers(0, 50, (2, 3, 3))
    fabric = Fabric(3, 1.0, 1.0, np.ones((3, 3), dtype=bool))
    gpus = assign_forwards(traffic, fabric)
    assert boundary_costs(traffic, gpus, fabric.seconds).sum() == least_cost(traffic, fabric.seconds)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["highs", "cbc"]), st.sampled_from([1, 2]))
def test_clusters_to_gpus_are_optimal_on_several_nodes(seed, backend, per_node):
    traffic = np.random.default_rng(seed).integers(0, 50, (1, 4, 4))
    fabric = Fabric(per_node, 1.0, 4.0, np.ones((4, 4), dtype=bool))
    start = assign_forwards(traffic, fabric)
    solver = SolverSettings(backend=backend)
    gpus, optimal, _ = assign_window(traffic, start, range(2), fabric, solver, 20.0)
    assert optimal
    assert boundary_costs(traffic, gpus, fabric.seconds).sum() == pytest.approx(least_cost(traffic, fabric.seconds))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_layer_is_re_assigned_optimally_against_its_neighbours(layer):
    rng = np.random.default_rng(layer)
    traffic = rng.integers(0, 50, (2, 4, 4))
    allowed = np.ones((4, 4), dtype=bool)
    allowed[0, 3] = False  # too large a cluster for the last GPU
    fabric = Fabric(2, 1.0, 3.0, allowed)
    start = np.tile(np.arange(4), (3, 1))
    gpus, optimal, _ = assign_window(traffic, start, range(layer, layer + 1), fabric, QUICK, 20.0)
    costs = []
    for order in permutations(range(4)):
        rows = start.copy()
        rows[layer] = order
        if order[0] != 3:
            costs.append(boundary_costs(traffic, rows, fabric.seconds).sum())
    assert optimal
    assert boundary_costs(traffic, gpus, fabric.seconds).sum() == pytest.approx(min(costs))
    assert np.array_equal(np.delete(gpus, layer, axis=0), np.delete(start, layer, axis=0))


def test_moetuner_places_large_clusters_where_they_fit():
    problem = PlacementProblem(random_statistics(2, 4, 9), (5, 1, 3, 0), Objective(), cluster=cluster_of(2, 2))
    solution = solve("moetuner", problem, QUICK)
    check_slots(solution.slots, 9, range(4))
    assert all(len(held) <= most for layer in solution.slots for held, most in zip(layer, (5, 1, 3, 0), strict=True))
    assert sum(len(held) for held in solution.slots[0]) == 9
