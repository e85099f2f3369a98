"""Strategies: optimal where they say so, within their bounds and budgets always."""

from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import ProblemError
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots, slots_from_gpu, sorted_slots
from placement.strategies import STRATEGIES, solve
from placement.strategies import locality as locality_module
from placement.strategies.balance_program import balance_layer
from placement.strategies.balance_search import busiest_load
from placement.strategies.eplb import copy_counts, eplb_slots
from placement.strategies.locality_bound import pair_bound
from placement.strategies.locality_program import solve_locality_program
from profiler.statistics import RoutingStatistics
from tests.support.routes import count_routes, make_routes

QUICK = SolverSettings(search_rounds=40, time_limit_s=20.0)


def random_statistics(seed, num_layers, num_experts, most=50):
    """Counts without any structure; loads and transitions need not agree."""
    rng = np.random.default_rng(seed)
    return RoutingStatistics(
        num_tokens=1,
        popularity=rng.integers(1, most, (num_layers, num_experts)),
        top1_popularity=rng.integers(1, most, (num_layers, num_experts)),
        affinity=rng.integers(0, most, (num_layers - 1, num_experts, num_experts)),
        top1_affinity=rng.integers(0, most, (num_layers - 1, num_experts, num_experts)),
        coactivation=np.zeros((num_layers, num_experts, num_experts), dtype=np.int64),
    )


def all_layers_without_copies(num_experts, sizes):
    """Every way to put experts on GPUs of these sizes, as GPU of each expert."""
    labels = [gpu for gpu, size in enumerate(sizes) for _ in range(size)]
    return [row for row in product(range(len(sizes)), repeat=num_experts) if sorted(row) == labels]


def best_without_copies(problem, sizes):
    """Brute force over all chains; None where the load bound leaves none."""
    values = []
    for rows in product(all_layers_without_copies(problem.num_experts, sizes), repeat=problem.num_layers):
        slots = slots_from_gpu(np.array(rows), problem.num_gpus)
        if problem.within_load_bound(slots):
            values.append(problem.value(slots))
    if not values:
        return None
    return max(values) if problem.objective.name == "locality" else min(values)


def least_busiest_with_copies(loads, slots_per_gpu):
    """Brute force over every filling of every GPU."""
    fillings = [
        [held for size in range(slots + 1) for held in combinations(range(len(loads)), size)] for slots in slots_per_gpu
    ]
    complete = (gpus for gpus in product(*fillings) if len(set().union(*gpus)) == len(loads))
    return min(busiest_load(loads, gpus) for gpus in complete)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1.05, 1.2]), st.sampled_from(["all", "top1"]))
def test_locality_is_optimal_on_tiny_problems(seed, max_load, pairs):
    problem = PlacementProblem(random_statistics(seed, 3, 4), (2, 2), Objective("locality", pairs, max_load))
    best = best_without_copies(problem, [2, 2])
    if best is None:
        with pytest.raises(ProblemError, match="the least load found"):
            solve("ilp", problem, QUICK)
        return
    solution = solve("ilp", problem, QUICK)
    assert solution.value == pytest.approx(best)
    assert solution.optimal
    assert problem.within_load_bound(solution.slots)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
@pytest.mark.parametrize(("slots", "max_load"), [((2, 2), None), ((3, 1), None), ((2, 2), 1.3), ((2, 1, 1), None)])
def test_locality_program_is_optimal_and_its_bound_valid(backend, slots, max_load):
    for seed in range(3):
        problem = PlacementProblem(random_statistics(seed, 3, 4), slots, Objective("locality", max_load=max_load))
        best = best_without_copies(problem, list(slots))
        start = np.tile(np.repeat(np.arange(len(slots)), slots), (3, 1))
        found, bound, result = solve_locality_program(
            problem.transitions,
            problem.loads,
            slots,
            problem.load_limits,
            start,
            SolverSettings(backend=backend),
            time_limit_s=20,
        )
        if best is None:
            assert result.infeasible
            continue
        total = problem.transitions.sum()
        assert problem.value(slots_from_gpu(found, len(slots))) == pytest.approx(best)
        assert bound == round(best * total)
        assert pair_bound(problem.transitions, slots) >= round(best * total)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_search_and_program_agree_with_the_exact_dynamic_program(seed):
    problem = PlacementProblem(random_statistics(seed, 3, 6), (3, 3), Objective("locality", max_load=1.4))
    exact = solve("ilp", problem, QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality_module, "is_small", lambda num_layers, sizes: False)
        searched = solve("ilp", problem, QUICK)
        patch.setattr(locality_module, "is_tractable", lambda num_layers, num_experts, num_gpus: False)
        bounded = solve("ilp", problem, QUICK)
    assert searched.value == pytest.approx(exact.value)
    assert searched.optimal
    assert bounded.value <= exact.value + 1e-12 <= bounded.bound + 2e-12


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=4).filter(any),
    st.sampled_from([(2, 2), (3, 2), (1, 3), (2, 2, 1)]),
    st.sampled_from(["highs", "cbc"]),
)
def test_balance_is_optimal_on_tiny_layers(loads, slots, backend):
    if max(slots) > len(loads) or sum(slots) < len(loads):
        return
    loads = np.array(loads)
    layer = balance_layer(loads, slots, SolverSettings(backend=backend), time_limit_s=20)
    best = least_busiest_with_copies(loads, slots)
    assert busiest_load(loads, layer.gpus) == pytest.approx(best, rel=2e-4)
    assert layer.bound <= best * (1 + 1e-6)
    assert layer.bound == pytest.approx(best, rel=1e-3)


def test_balance_beats_greedy_where_greedy_is_not_optimal():
    loads = np.array([600, 560, 120, 120, 20, 10, 10, 10])
    assert busiest_load(loads, eplb_slots(loads[None], [2] * 8)[0]) == 232
    layer = balance_layer(loads, [2] * 8, SolverSettings(), time_limit_s=60)
    assert layer.busiest == pytest.approx(590 / 3)
    assert layer.bound == pytest.approx(590 / 3, rel=1e-4)


@st.composite
def problems(draw):
    num_gpus, num_experts = draw(st.integers(1, 4)), draw(st.integers(2, 8))
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_gpus, max_size=num_gpus))
    if sum(slots) < num_experts:
        slots[0] = num_experts
    name = draw(st.sampled_from(["locality", "balance"]))
    max_load = draw(st.sampled_from([None, 1.3])) if name == "locality" else None
    statistics = random_statistics(draw(st.integers(0, 10**6)), draw(st.integers(1, 3)), num_experts)
    return PlacementProblem(statistics, tuple(slots), Objective(name, "all", max_load))


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(sorted(STRATEGIES)))
def test_every_plan_is_valid_and_no_bound_is_beaten(problem, strategy):
    try:
        solution = solve(strategy, problem, SolverSettings(search_rounds=10, time_limit_s=2.0))
    except ProblemError as error:
        assert "the least load found" in str(error)  # noqa: PT017
        return
    check_slots(solution.slots, problem.num_experts, range(problem.num_layers))
    for gpus in solution.slots:
        assert all(len(held) <= slots for held, slots in zip(gpus, problem.slots_per_gpu, strict=True))
    assert solution.value == pytest.approx(problem.value(solution.slots))
    if strategy == "ilp":
        assert problem.within_load_bound(solution.slots)
    if solution.bound is not None:
        worse = solution.bound - solution.value
        assert (worse if problem.objective.name == "locality" else -worse) >= -1e-9
        assert solution.gap == pytest.approx(abs(worse) / max(solution.value, 1e-12))


def test_eplb_fills_every_slot_and_gives_copies_to_the_busiest():
    loads = np.array([[90, 50, 5, 5, 4, 3, 2, 1]])
    # 90 → 45, 50 → 25, 45 → 30, 30 → 22.5
    assert copy_counts(loads[0], [3, 3, 3, 3]).tolist() == [4, 2, 1, 1, 1, 1, 1, 1]
    slots = eplb_slots(loads, [3, 3, 3, 3])
    assert [len(held) for held in slots[0]] == [3, 3, 3, 3]
    check_slots(slots, 8, [0])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_eplb_uses_every_slot_of_equal_gpus(num_gpus, num_experts, seed):
    rng = np.random.default_rng(seed)
    per_gpu = int(rng.integers(-(-num_experts // num_gpus), num_experts + 1))
    loads = rng.zipf(1.3, size=(2, num_experts)).clip(0, 10**6)
    slots = eplb_slots(loads, [per_gpu] * num_gpus)
    check_slots(slots, num_experts, [0, 1])
    assert all(len(held) == per_gpu for gpus in slots for held in gpus)


def test_same_seed_same_plan():
    problem = PlacementProblem(random_statistics(3, 4, 12), (4, 4, 4), Objective("locality", max_load=1.3))
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality_module, "is_tractable", lambda num_layers, num_experts, num_gpus: False)
        for seed in (0, 0, 1):
            runs.append(solve("ilp", problem, SolverSettings(seed=seed, search_rounds=40)))
    assert runs[0].slots == runs[1].slots
    assert runs[0].slots != runs[2].slots


def test_copies_keep_a_bound_that_one_copy_cannot():
    popularity = np.array([[100, 10, 10, 10], [10, 10, 10, 100], [100, 10, 10, 10]])
    statistics = random_statistics(0, 3, 4)
    statistics = replace(statistics, popularity=popularity, top1_popularity=popularity)
    objective = Objective("locality", max_load=1.1)
    with pytest.raises(ProblemError, match=r"1\.69231 of the mean \(no placement goes below 1\.69231\)"):
        solve("ilp", PlacementProblem(statistics, (2, 2), objective), QUICK)
    problem = PlacementProblem(statistics, (3, 3), objective)
    solution = solve("ilp", problem, QUICK)
    assert problem.within_load_bound(solution.slots)
    assert solution.bound >= solution.value


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_one_layer_has_no_transitions_to_keep(backend):
    objective = Objective("locality", max_load=1.2)
    problem = PlacementProblem(random_statistics(0, 1, 12, most=20), (4, 4, 4), objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locality_module, "is_small", lambda num_layers, sizes: False)
        solution = solve("ilp", problem, SolverSettings(backend=backend))
    assert (solution.value, solution.bound, solution.optimal) == (1.0, 1.0, True)
    assert problem.within_load_bound(solution.slots)


def test_a_load_bound_at_the_edge_is_met_to_the_last_pair():
    """Where an even split exists, the search does not stop a hair above it and call it impossible."""
    half = np.random.default_rng(0).integers(1000, 9000, 32)
    loads = np.concatenate([half, half[:-2], [half[-2] + half[-1] - 1, 1]])
    even = loads.sum() / 2
    assert balance_layer(loads, [32, 32], QUICK, time_limit_s=20, most_copies=1, enough=even).busiest == even


def test_spare_slots_are_used_where_they_help():
    statistics = count_routes(make_routes(1, 500, 4, 8, 2), 8)
    wide, narrow = (PlacementProblem(statistics, slots, Objective("locality")) for slots in ((5, 5), (4, 4)))
    solution = solve("ilp", wide, QUICK)
    assert solution.value >= solve("ilp", narrow, QUICK).value
    assert solution.bound >= solution.value
    balance = replace(wide, objective=Objective("balance"))
    assert solve("ilp", balance, QUICK).value <= solve("eplb", balance, QUICK).value


def test_structure_is_found():
    """Experts come in groups that follow each other: a placement by group keeps everything."""
    groups = np.stack([np.random.default_rng(layer).permutation(12) // 3 for layer in range(5)])
    affinity = np.stack([(a[:, None] == b[None, :]) * 10 for a, b in pairwise(groups)])
    flat = np.full((5, 12), 30)
    statistics = RoutingStatistics(1, flat, flat, affinity, affinity, np.zeros((5, 12, 12), dtype=np.int64))
    solution = solve("ilp", PlacementProblem(statistics, (3, 3, 3, 3), Objective("locality", max_load=1.0)), QUICK)
    assert (solution.value, solution.optimal) == (1.0, True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s: PlacementProblem(s, (1, 2), Objective()), "too few for 4 experts"),
        (lambda s: PlacementProblem(s, (5, 2), Objective()), "at most 4"),
        (lambda s: PlacementProblem(s, (), Objective()), "slots_per_gpu"),
        (lambda s: PlacementProblem(s, (4, -1), Objective()), "slots_per_gpu"),
        (lambda s: solve("best", PlacementProblem(s, (4,), Objective()), QUICK), "strategy 'best'"),
        (lambda s: Objective("speed"), "objective 'speed'"),
        (lambda s: Objective("locality", "some"), "pairs 'some'"),
        (lambda s: Objective("locality", "all", 0.9), "max_load 0.9"),
        (lambda s: Objective("locality", "all", float("nan")), "max_load nan"),
        (lambda s: Objective("balance", "all", 1.1), "remove max_load"),
        (lambda s: SolverSettings(time_limit_s=0), "time_limit_s 0"),
        (lambda s: SolverSettings(backend="gurobi"), "backend 'gurobi'"),
        (lambda s: SolverSettings(seed=-1), "seed -1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(build, message):
    with pytest.raises(ProblemError) as caught:
        build(random_statistics(0, 2, 4))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_negative_counts_are_refused():
    statistics = random_statistics(0, 2, 4)
    statistics.popularity[1, 2] = -3
    with pytest.raises(ProblemError, match="negative count"):
        PlacementProblem(statistics, (2, 2), Objective())


def test_an_expert_never_seen_still_gets_a_slot():
    statistics = random_statistics(0, 2, 4)
    statistics.popularity[:, 3] = 0
    statistics.affinity[:, 3] = statistics.affinity[:, :, 3] = 0
    for strategy in STRATEGIES:
        for name in ("locality", "balance"):
            solution = solve(strategy, PlacementProblem(statistics, (3, 3), Objective(name)), QUICK)
            check_slots(sorted_slots(solution.slots), 4, [0, 1])
