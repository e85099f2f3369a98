"""Locality: search, bounds, copies for the rule ``nearest``, nodes, and limits of time."""

import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placement_generators import SMALL, SyntheticRouting, count_routes
from placement.errors import ProblemError
from placement.metrics import copy_weights, even_locality
from placement.plan import Dispatch, Workload
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots, slots_from_gpu, sorted_slots
from placement.strategies import chain_search
from placement.strategies import locality as locality_module
from placement.strategies.chain_program import best_chain
from placement.strategies.chain_search import Chain, align_labels, recombine
from placement.strategies.locality import solve_locality
from placement.strategies.locality_bound import pair_bound
from placement.strategies.nearest_copies import add_nearest_copies, nearest_locality

QUICK = SolverSettings(search_rounds=30, time_limit_s=20.0)
ROUTING = SyntheticRouting(num_layers=5, num_experts=16, top_k=2, num_tokens=1500, num_topics=5, seed=3)


@pytest.fixture(autouse=True)
def _search_alone(monkeypatch):
    """Without the integer program, which would use all the time on problems of this size."""
    monkeypatch.setattr(locality_module, "is_tractable", lambda num_layers, num_experts, num_gpus: False)


def silent(line):
    """No progress."""


def make_problem(routing=ROUTING, slots=(4, 4, 4, 4), max_load=None, pairs="all", **fields):
    routes = routing.routes()
    objective = Objective("locality", pairs, max_load)
    return PlacementProblem(count_routes(routes, routing.num_experts), slots, objective, routes=routes, **fields)


def make_chain(seed, num_layers, sizes):
    rng = np.random.default_rng(seed)
    num_items = sum(sizes)
    transitions = rng.integers(0, 30, (num_layers - 1, num_items, num_items)).astype(float)
    loads = rng.integers(1, 20, (num_layers, num_items)).astype(float)
    twins = np.tile(np.arange(num_items), (num_layers, 1))
    return Chain(transitions, loads, tuple(sizes), np.full(num_layers, np.inf), twins)


def states_of(sizes):
    """Every way to put items on GPUs of these sizes."""
    labels = sorted(gpu for gpu, size in enumerate(sizes) for _ in range(size))
    return [np.array(row) for row in product(range(len(sizes)), repeat=len(labels)) if sorted(row) == labels]


def best_by_brute_force(chain):
    """Most transitions kept, over every chain of states that keep the limits."""
    all_states = [
        [state for state in states_of(chain.sizes) if np.bincount(state, loads).max() <= limit]
        for loads, limit in zip(chain.loads, chain.limits, strict=True)
    ]
    values = [0.0] * len(all_states[0])
    for counts, before, states in zip(chain.transitions, all_states[:-1], all_states[1:], strict=True):
        values = [
            max(value + counts[a[:, None] == b].sum() for value, a in zip(values, before, strict=True)) for b in states
        ]
    return max(values)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (3, 1), (2, 1, 1), (2, 2, 0), (1, 1, 1, 1)]), st.booleans())
def test_dynamic_program_is_exact_with_renamed_gpus(seed, sizes, bounded):
    chain = make_chain(seed, 4, sizes)
    if bounded:
        first = np.repeat(np.arange(len(sizes)), sizes)
        limits = chain.gpu_loads(np.tile(first, (4, 1))).max(axis=1)
        chain = replace(chain, limits=limits)
    gpu = best_chain(chain.transitions, chain.loads, sizes, chain.limits if bounded else None)
    assert chain.kept(gpu) == best_by_brute_force(chain)
    assert chain.fits(gpu).all()
    assert all(np.bincount(row, minlength=len(sizes)).tolist() == list(sizes) for row in gpu)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (3, 3), (2, 1, 2), (2, 2, 2)]))
def test_recombination_is_the_best_of_all_mixtures(seed, sizes):
    """Against every choice of a chain per layer, labels aligned by every permutation of equal GPUs."""
    chain = make_chain(seed, 3, sizes)
    rng = np.random.default_rng(seed)
    pool = [rng.permuted(np.tile(np.repeat(np.arange(len(sizes)), sizes), (3, 1)), axis=1) for _ in range(3)]
    renamings = [
        np.array(names)
        for names in product(range(len(sizes)), repeat=len(sizes))
        if len(set(names)) == len(sizes) and all(sizes[a] == sizes[b] for a, b in enumerate(names))
    ]
    best = max(
        chain.kept(np.stack([pool[i][0], first[pool[j][1]], second[pool[k][2]]]))
        for i, j, k in product(range(3), repeat=3)
        for first, second in product(renamings, repeat=2)
    )
    mixed = recombine(chain, pool)
    assert chain.kept(mixed) == best
    assert best >= max(chain.kept(align_labels(chain, gpu)) for gpu in pool)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(2, 2), (3, 2), (2, 1, 2)]), st.integers(0, 3))
def test_pair_bound_holds_for_copies_too(seed, slots, num_copies):
    rng = np.random.default_rng(seed)
    transitions = rng.integers(0, 40, (2, 4, 4))
    bound = pair_bound(transitions, slots)
    for _ in range(30):
        layers = []
        while len(layers) < 3:
            held = [rng.choice(4, size=rng.integers(0, size + 1), replace=False) for size in slots]
            if len(set().union(*map(set, held))) == 4:
                layers.append(held)
        assert even_locality(sorted_slots(layers), transitions) * transitions.sum() <= bound + 1e-6


def test_small_chain_is_solved_exactly_and_the_search_finds_the_same(monkeypatch):
    problem = PlacementProblem(count_routes(SMALL.routes(), 8), (2, 2, 2, 2), Objective("locality"))
    started = time.process_time()
    slots, bound, _ = solve_locality(problem, SolverSettings(), silent)
    assert time.process_time() - started < 2.0
    assert problem.value(slots) == pytest.approx(bound, abs=1e-12)
    monkeypatch.setattr(locality_module, "is_small", lambda num_layers, sizes: False)
    searched, upper, _ = solve_locality(problem, SolverSettings(search_rounds=200), silent)
    assert problem.value(searched) == pytest.approx(bound, abs=1e-12)
    assert upper >= bound


@pytest.mark.parametrize("max_load", [None, 1.1])
def test_search_is_repeatable_valid_and_far_from_random(max_load):
    problem = make_problem(max_load=max_load)
    results = [solve_locality(problem, replace(QUICK, workers=workers), silent) for workers in (1, 2)]
    assert results[0] == results[1]
    slots, bound, notes = results[0]
    check_slots(slots, 16, range(5))
    assert problem.within_load_bound(slots)
    assert problem.value(slots) <= bound
    assert notes == []
    random = slots_from_gpu(np.random.default_rng(0).permuted(np.tile(np.repeat(np.arange(4), 4), (5, 1)), axis=1), 4)
    assert problem.value(slots) > 1.2 * problem.value(random)


def test_spare_slots_allow_uneven_gpus_and_stay_empty_under_level():
    """Copies that share evenly cannot raise locality, more experts on one GPU can."""
    even, _, _ = solve_locality(make_problem(), QUICK, silent)
    problem = make_problem(slots=(6, 6, 6, 6))
    slots, bound, notes = solve_locality(problem, QUICK, silent)
    assert problem.value(slots) > problem.value(even)
    assert all(sum(map(len, gpus)) == 16 for gpus in slots)
    assert any("stay empty" in note for note in notes)
    assert bound >= problem.value(slots)


def test_copies_are_made_where_the_load_bound_needs_them():
    problem = make_problem(replace(ROUTING, zipf=1.5), slots=(6, 6, 6, 6), max_load=1.05)
    slots, bound, _ = solve_locality(problem, QUICK, silent)
    check_slots(slots, 16, range(5))
    assert problem.within_load_bound(slots)
    assert all(len(held) <= 6 for gpus in slots for held in gpus)
    assert bound >= problem.value(slots)


@pytest.mark.parametrize(("pairs", "max_load"), [("all", None), ("all", 1.2), ("top1", None)])
def test_nearest_copies_raise_the_locality_of_the_rule(pairs, max_load):
    rules = {"dispatch": Dispatch("nearest", 64), "workload": Workload("decode", (8,), "coherent")}
    level, _, _ = solve_locality(make_problem(pairs=pairs, max_load=max_load), QUICK, silent)
    problem = make_problem(slots=(5, 5, 5, 5), pairs=pairs, max_load=max_load, **rules)
    slots, bound, notes = solve_locality(problem, QUICK, silent)
    check_slots(slots, 16, range(5))
    assert problem.within_load_bound(slots)
    assert bound is None
    value = replayed(problem, slots)
    assert value > replayed(problem, level)
    assert any(f"nearest {value:.4f}" in note for note in notes)


def replayed(problem, slots):
    top_k = problem.routes.shape[2] if problem.objective.pairs == "all" else 1
    routes = np.ascontiguousarray(problem.routes[:, :, :top_k].swapaxes(0, 1)).astype(np.intp)
    return nearest_locality(routes, copy_weights(slots, problem.num_experts).swapaxes(1, 2) > 0)


def test_nearest_replay_equals_counted_locality_without_copies():
    problem = make_problem()
    slots, _, _ = solve_locality(problem, QUICK, silent)
    assert replayed(problem, slots) == pytest.approx(problem.value(slots), abs=1e-12)


def test_nearest_follows_a_token_to_its_copy():
    """Two GPUs; every token's second expert has a copy wherever its first may be."""
    routes = np.array([[[0], [2]], [[1], [2]]])
    statistics = count_routes(routes, 4)
    problem = PlacementProblem(statistics, (3, 3), Objective("locality"), routes=routes)
    single = sorted_slots([[[0, 2], [1, 3]], [[0, 2], [1, 3]]])
    assert replayed(problem, single) == 0.5
    slots, value = add_nearest_copies(problem, single, deadline=time.perf_counter() + 10)
    assert value == replayed(problem, slots) == 1.0
    assert 2 in slots[1][1]


def test_nearest_needs_routes():
    rules = {"dispatch": Dispatch("nearest", 64), "workload": Workload("decode", (8,), "coherent")}
    problem = replace(make_problem(slots=(5, 5, 5, 5), **rules), routes=None)
    with pytest.raises(ProblemError, match="needs tokens"):
        solve_locality(problem, QUICK, silent)


def test_nodes_come_first():
    """Two nodes of two GPUs: more stays within a node than the flat search keeps there by chance."""
    flat = make_problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlacementProblem, "gpus_per_node", property(lambda self: 2))
        slots, bound, notes = solve_locality(flat, QUICK, silent)
    check_slots(slots, 16, range(5))
    assert all(len(held) == 4 for gpus in slots for held in gpus)
    nodes = sorted_slots([[gpus[0] + gpus[1], gpus[2] + gpus[3]] for gpus in slots])
    two = PlacementProblem(flat.statistics, (8, 8), Objective("locality"))
    best, _, _ = solve_locality(two, QUICK, silent)
    assert even_locality(nodes, flat.transitions) == pytest.approx(two.value(best), rel=1e-3)
    assert f"{even_locality(nodes, flat.transitions):.4f} of transitions stay within their node" in notes[-1]
    assert bound >= flat.value(slots)


def test_time_limit_cuts_the_search_and_says_so():
    problem = make_problem(replace(ROUTING, num_layers=12, num_experts=64), slots=(8,) * 8)
    solve_locality(problem, QUICK, silent)  # compiled
    started = time.perf_counter()
    slots, bound, notes = solve_locality(problem, SolverSettings(search_rounds=10**6, time_limit_s=1.5), silent)
    assert time.perf_counter() - started < 4.0
    assert notes == [chain_search.LIMIT_HIT]
    assert problem.value(slots) <= bound


def test_interrupt_returns_the_best_so_far():
    """Ctrl-C after the second generation: the value is the last one reported."""
    reported = []

    def progress(line):
        if line.startswith("locality 0"):
            reported.append(line)
        if len(reported) == 4:
            reported.append("pressed")
            raise KeyboardInterrupt

    problem = make_problem()
    slots, _, notes = solve_locality(problem, QUICK, progress)
    assert f"locality {problem.value(slots):.4f}" == reported[3]
    assert notes == ["interrupted: this is the best placement found until then"]


@pytest.mark.parametrize(("num_gpus", "max_load", "least"), [(4, None, 0.55), (8, 1.3, 0.30)])
def test_real_trace(real_trace, num_gpus, max_load, least):
    """Near the best values known after a fraction of the default search."""
    from profiler.statistics import collect_statistics

    statistics = collect_statistics(real_trace, real_trace.split_mask("even"))
    objective = Objective("locality", max_load=max_load)
    problem = PlacementProblem(statistics, (32 // num_gpus,) * num_gpus, objective)
    slots, bound, _ = solve_locality(problem, SolverSettings(search_rounds=100), silent)
    assert least <= problem.value(slots) <= bound
    assert problem.within_load_bound(slots)
