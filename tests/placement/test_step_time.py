"""The objective ``step_time``: the sampled cost model, its bound, the search, and re-planning from a running plan."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster import Cluster, Link
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes
from placement.migration import num_moves
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.sampled_steps import SampledSteps
from placement.slots import slots_from_gpu, sorted_slots
from placement.strategies import solve
from placement.strategies.replan import Stage, choose_stages
from tests.support.routes import make_routes

QUICK = SolverSettings(search_rounds=40, time_limit_s=20)


def cluster_of(nodes: int, gpus_per_node: int) -> Cluster:
    memory = (1e12,) * (nodes * gpus_per_node)
    near, far = Link(1e-6, 4e9), Link(3e-6, 1e9)
    cluster = Cluster("test", nodes, gpus_per_node, memory, 4e12, 1e15, 5.0, near, near, far)
    return replace(cluster, coefficients=(cluster.coefficients_for(2_000_000_000, 4096),))


def random_slots(rng, num_layers, num_experts, slots_per_gpu):
    """Every expert once, the rest of the slots filled with copies where they fit."""
    layers = []
    for _ in range(num_layers):
        gpus = [set() for _ in slots_per_gpu]
        for expert in rng.permutation(num_experts):
            free = [gpu for gpu, held in enumerate(gpus) if len(held) < slots_per_gpu[gpu]]
            gpus[rng.choice(free)].add(int(expert))
        for gpu, held in enumerate(gpus):
            absent = [expert for expert in range(num_experts) if expert not in held]
            held.update(int(e) for e in rng.permutation(absent)[: slots_per_gpu[gpu] - len(held)])
        layers.append([sorted(held) for held in gpus])
    return sorted_slots(layers)


def problem_of(routes, num_experts, slots, cluster, workload=None, **more) -> PlacementProblem:
    from benchmarks.placement_generators import count_routes

    return PlacementProblem(
        count_routes(routes, num_experts),
        tuple(slots),
        Objective("step_time"),
        cluster=cluster,
        routes=routes,
        workload=workload or Workload(batch_sizes=(1, 4)),
        **more,
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exchange=st.sampled_from(["allreduce", "alltoall", "coherent"]),
    shape=st.sampled_from([(1, 2), (1, 3), (2, 2), (3, 1)]),
    num_tokens=st.sampled_from([2, 5, 40]),
    split=st.sampled_from([None, 0, 3]),
)
def test_the_search_and_the_evaluator_agree_on_the_same_steps(seed, exchange, shape, num_tokens, split):
    rng = np.random.default_rng(seed)
    cluster = cluster_of(*shape)
    routes = make_routes(seed, 60, 3, 7, 3)
    slots = random_slots(rng, 3, 7, [7 // cluster.num_gpus + 2] * cluster.num_gpus)
    workload = Workload(batch_sizes=(num_tokens,), exchange=exchange)
    steps = SampledSteps(routes, 7, cluster, workload, split, seed=5)
    drawn = len(steps.groups[0].weights[0])
    plan = PlacementPlan("m", 7, 3, (0, 1, 2), slots, workload=workload, dispatch=Dispatch("level", split))
    metrics = evaluate_routes(plan, routes, cluster, [num_tokens], batches=drawn, seed=5)
    assert steps.value(slots) == pytest.approx(metrics.by_batch_size[num_tokens].step_us, rel=1e-9)
    assert steps.lower_bound() <= steps.value(slots) * (1 + 1e-9)


def test_steps_of_one_token_are_all_tokens_once():
    routes = make_routes(3, 50, 2, 6, 2)
    cluster = cluster_of(1, 2)
    steps = SampledSteps(routes, 6, cluster, Workload(batch_sizes=(1,)), None, seed=0)
    slots = slots_from_gpu(np.tile(np.arange(6) % 2, (2, 1)), 2)
    c = cluster.coefficients[0]
    c0, c1, c2 = c.c0_us.value, c.c1_us.value, c.c2_us.value
    busiest = np.maximum((routes % 2).sum(axis=2), (1 - routes % 2).sum(axis=2))  # [T, L]
    exchange = 2 * 1e6 * (cluster.intra_node.latency_s + 2 * 4096 / cluster.intra_node.bytes_per_s)
    assert steps.value(slots) == pytest.approx((c0 + (c1 + c2) * busiest).sum(axis=1).mean() + exchange)


def test_shares_weigh_batch_sizes():
    routes = make_routes(1, 80, 2, 6, 2)
    cluster = cluster_of(1, 3)
    slots = slots_from_gpu(np.tile(np.arange(6) % 3, (2, 1)), 3)

    def value(sizes, shares=None):
        return SampledSteps(routes, 6, cluster, Workload(batch_sizes=sizes, shares=shares), None, seed=0).value(slots)

    expected = 0.75 * value((1,)) + 0.25 * value((16,))
    assert value((1, 16), (3.0, 1.0)) == pytest.approx(expected)


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall", "coherent"])
def test_the_plan_is_never_worse_than_what_it_starts_from(exchange):
    routes = make_routes(2, 400, 4, 8, 2)
    workload = Workload(batch_sizes=(1, 8), exchange=exchange)
    problem = problem_of(routes, 8, (3, 3, 3, 3), cluster_of(2, 2), workload)
    solution = solve("step_time", problem, QUICK)
    for other in ("contiguous", "eplb", "eplb_hierarchical", "lina"):
        assert solution.value <= solve(other, problem, QUICK).value * (1 + 1e-12)
    assert solution.bound <= solution.value
    assert solution.value == pytest.approx(problem.value(solution.slots))


@pytest.mark.parametrize("slots", [(3, 3), (4, 3), (4, 4)])
def test_small_cases_are_solved_to_the_optimum(slots):
    routes = make_routes(4, 60, 1, 6, 2)
    problem = problem_of(routes, 6, slots, cluster_of(1, 2), Workload(batch_sizes=(1, 3)))
    best = min(problem.value((layer,)) for layer in _placements(6, slots))
    found = solve("step_time", problem, SolverSettings(search_rounds=300))
    assert found.value == pytest.approx(best)
    assert found.bound <= best * (1 + 1e-12)


def _placements(num_experts, slots):
    """All placements of one layer on two GPUs."""
    choices = [[held for n in range(s + 1) for held in combinations(range(num_experts), n)] for s in slots]
    return [(a, b) for a, b in product(*choices) if len({*a, *b}) == num_experts]


def test_copies_that_cost_more_than_they_save_are_left_out():
    # Every expert has many tokens in every step, so a copy is read in vain: reading dominates, tokens are balanced.
    rng = np.random.default_rng(0)
    routes = np.argsort(rng.random((500, 2, 4)), axis=2)[:, :, :2]
    problem = problem_of(
        routes, 4, (3, 3), cluster_of(1, 2), Workload("prefill", (256,)), dispatch=Dispatch("level", 64)
    )
    solution = solve("step_time", problem, QUICK)
    assert all(sum(map(len, layer)) == 4 for layer in solution.slots)


def test_the_same_seed_gives_the_same_plan_with_any_number_of_workers():
    problem = problem_of(make_routes(5, 300, 3, 8, 2), 8, (5, 5), cluster_of(1, 2))
    plans = {solve("step_time", problem, replace(QUICK, workers=n)).slots for n in (1, 2, 2)}
    assert len(plans) == 1


def test_a_time_limit_is_kept_and_said():
    problem = problem_of(make_routes(6, 2000, 12, 32, 4), 32, (10,) * 4, cluster_of(1, 4))
    assert problem.sampled_steps  # drawn, and loops compiled, before the clock starts
    solve("step_time", problem, SolverSettings(time_limit_s=0.2))
    started = time.perf_counter()
    solution = solve("step_time", problem, SolverSettings(time_limit_s=0.5, search_rounds=10**6))
    assert time.perf_counter() - started < 3
    assert any("time limit" in note for note in solution.notes)


@pytest.mark.parametrize("max_moves", [0, 1, 3, 10])
def test_a_replan_keeps_to_its_moves_and_gets_better_with_more(max_moves):
    old = problem_of(make_routes(7, 400, 4, 8, 2), 8, (3, 3, 3), cluster_of(1, 3))
    running = solve("eplb", old, QUICK).slots
    fresh = problem_of(make_routes(8, 400, 4, 8, 2), 8, (3, 3, 3), cluster_of(1, 3), running=running)
    solutions = [solve("step_time", replace(fresh, max_moves=n), QUICK) for n in (max_moves, max_moves + 4)]
    assert num_moves(running, solutions[0].slots) <= max_moves
    assert solutions[0].value <= fresh.value(running) * (1 + 1e-12)
    assert solutions[1].value <= solutions[0].value * (1 + 1e-12)
    if max_moves == 0:
        assert solutions[0].value == pytest.approx(fresh.value(running))


@pytest.mark.parametrize("seed", range(4))
def test_a_replan_of_chained_layers_is_never_worse_than_the_running_plan(seed):
    rng = np.random.default_rng(seed)
    routes = make_routes(seed, 200, 5, 12, 1)
    workload = Workload(batch_sizes=(4,), exchange="coherent")
    problem = problem_of(routes, 12, (5,) * 4, cluster_of(2, 2), workload, running=random_slots(rng, 5, 12, [5] * 4))
    for max_moves in (2, 8, 30):
        solution = solve("step_time", replace(problem, max_moves=max_moves), QUICK)
        assert solution.value <= problem.value(problem.running) * (1 + 1e-12)
        assert num_moves(problem.running, solution.slots) <= max_moves


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), max_moves=st.integers(0, 9))
def test_stages_are_chosen_as_brute_force_would(seed, max_moves):
    rng = np.random.default_rng(seed)
    stages = [
        [Stage(0, 0.0, np.array([[False]]))]
        + [
            Stage(int(rng.integers(1, 5)), float(rng.integers(0, 20)), np.array([[True]]))
            for _ in range(rng.integers(4))
        ]
        for _ in range(3)
    ]
    best = max(
        sum(stage.gain for stage in chosen)
        for chosen in product(*stages)
        if sum(stage.moves for stage in chosen) <= max_moves
    )
    held = choose_stages(stages, max_moves)
    chosen = [next(stage for stage in layer if stage.held is one) for layer, one in zip(stages, held, strict=True)]
    assert sum(stage.gain for stage in chosen) == best
    assert sum(stage.moves for stage in chosen) <= max_moves


@pytest.mark.parametrize("at", [1, 3, 5, 6, 7])
def test_ctrl_c_keeps_the_best_so_far(at):
    problem = problem_of(make_routes(9, 300, 3, 8, 2), 8, (5, 5), cluster_of(1, 2))
    values = []

    def interrupt(line):
        values.append(float(line.split()[2]))
        if len(values) == at:
            raise KeyboardInterrupt

    solution = solve("step_time", problem, QUICK, interrupt)
    assert any("interrupted" in note for note in solution.notes) == (len(values) >= at)
    assert solution.value <= min(values) + 0.1


def test_what_it_needs_is_said():
    routes = make_routes(0, 50, 2, 6, 2)
    problem = problem_of(routes, 6, (3, 3), cluster_of(1, 2))
    with pytest.raises(ProblemError, match="counts alone"):
        solve("step_time", replace(problem, routes=None), QUICK)
    with pytest.raises(ProblemError, match="coefficients"):
        solve("step_time", replace(problem, cluster=None), QUICK)
    with pytest.raises(ProblemError, match="nearest"):
        solve("step_time", replace(problem, dispatch=Dispatch("nearest")), QUICK)
    with pytest.raises(ProblemError, match="no token"):
        solve("step_time", replace(problem, routes=routes[:0]), QUICK)
