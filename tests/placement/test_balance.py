"""Balance: brute force on small layers, bounds, freedom spent on other tokens, limits of time, odd slots."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.metrics import layer_loads
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots
from placement.strategies import balance as balance_module
from placement.strategies.balance import solve_balance
from placement.strategies.balance_program import balance_layer, least_busiest
from placement.strategies.balance_search import busiest_load, harden, search_balance, tail_load
from placement.strategies.eplb import eplb_slots
from profiler.statistics import RoutingStatistics


def silent(line: str) -> None:
    pass


def problem_of(loads, slots, routes=None):
    loads = np.asarray(loads)
    pairs = np.zeros((len(loads) - 1, loads.shape[1], loads.shape[1]), dtype=np.int64)
    together = np.zeros((*loads.shape, loads.shape[1]), dtype=np.int64)
    statistics = RoutingStatistics(100, loads, loads, pairs, pairs, together)
    return PlacementProblem(statistics, tuple(slots), Objective("balance"), routes=routes)


def brute_force(loads, slots):
    """The least busiest load over every choice of experts for every GPU."""
    choices = [
        [held for size in range(count + 1) for held in itertools.combinations(range(len(loads)), size)]
        for count in slots
    ]
    complete = (gpus for gpus in itertools.product(*choices) if len(set().union(*gpus)) == len(loads))
    return min(busiest_load(loads, gpus) for gpus in complete)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=3, max_size=5),
    st.sampled_from([(2, 2), (3, 2), (1, 3), (0, 3, 2), (2, 2, 1), (1, 1, 1, 1, 1), (2, 2, 2)]),
)
def test_no_bound_is_beaten_and_small_layers_are_optimal(loads, slots):
    if sum(slots) < len(loads) or max(slots) > len(loads):
        return
    loads = np.array(loads)
    best = brute_force(loads, slots)
    most = min(sum(map(bool, slots)), 1 + sum(slots) - len(loads))
    assert least_busiest(loads, slots, most) <= best * (1 + 1e-9)
    found, bound, _ = solve_balance(problem_of(loads[None], slots), SolverSettings(time_limit_s=20), silent)
    check_slots(found, len(loads), [0])
    mean = loads.sum() / len(slots)
    assert bound * mean <= best * (1 + 1e-9) or not mean
    assert busiest_load(loads, found[0]) == pytest.approx(best, rel=5e-4)


@pytest.mark.parametrize(("slots", "expected"), [((2, 2), 19), ((2, 1, 1), 12)])
def test_company_of_the_heaviest_bounds_a_layer_without_spare_slots(slots, expected):
    # Pairs 12 + 3 and 9 + 7 would be 16; the mean is 15.5. With three GPUs the heaviest stands alone at best.
    loads = np.array([12, 9, 7, 3])
    bound = least_busiest(loads, slots, 1)
    assert max(loads.sum() / len(slots), 12) <= bound <= brute_force(loads, slots) <= expected


def test_the_copies_that_a_load_needs_must_have_slots():
    # Below 30 both heavy experts would need four copies each: ten slots, and there are nine.
    assert least_busiest(np.array([90, 90, 1, 1]), [3, 3, 3], 3) == pytest.approx(182 / 3)
    assert least_busiest(np.array([90, 90, 1, 1]), [1] * 9, 6) == 30
    assert least_busiest(np.array([90, 1, 1, 1]), [2, 2, 2], 2) == 45
    assert least_busiest(np.zeros(4, dtype=int), [2, 3], 2) == 0


def test_the_optimum_with_copies_is_proven_to_the_last_digit():
    loads = np.array([600, 560, 120, 120, 20, 10, 10, 10])
    layer = balance_layer(loads, [2] * 8, SolverSettings(), time_limit_s=60)
    assert layer.busiest == pytest.approx(590 / 3)
    assert layer.bound == layer.busiest


def test_pairs_without_spare_slots_are_proven_optimal():
    loads = np.random.default_rng(0).zipf(1.5, 16).clip(0, 1000)
    falling = np.sort(loads)[::-1]
    layer = balance_layer(loads, [2] * 8, SolverSettings(), time_limit_s=20)
    assert layer.busiest == layer.bound == max(falling[:8] + falling[:7:-1])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 7), min_size=2, max_size=5))
def test_uneven_slots_and_unseen_experts(seed, slots):
    slots[0] = max(slots[0], min(7, 7 - sum(slots[1:])))
    rng = np.random.default_rng(seed)
    loads = rng.zipf(1.4, (3, 7)).clip(0, 10**5) * rng.integers(0, 2, (3, 7))
    loads[1] = 0
    problem = problem_of(loads, slots)
    found, bound, _ = solve_balance(problem, SolverSettings(time_limit_s=1.0), silent)
    check_slots(found, 7, range(3))
    assert all(len(held) <= count for gpus in found for held, count in zip(gpus, slots, strict=True))
    ours, eplb = layer_loads(found, loads), layer_loads(eplb_slots(loads, slots), loads)
    assert (ours <= eplb * (1 + 1e-9)).all()
    assert bound <= problem.value(found)


def skewed_routes(seed, tokens=4000, length=100):
    """Routes [T, 2, 2] over 16 experts, of sequences that each prefer experts of their own, and the sequences."""
    rng = np.random.default_rng(seed)
    popular = np.random.default_rng(1).dirichlet(np.full(16, 0.7))
    parts = []
    for _ in range(tokens // length):
        own = 0.5 * popular + 0.5 * rng.dirichlet(np.full(16, 0.3))
        parts.append(np.stack([rng.choice(16, size=(length, 2), p=own) for _ in range(2)], axis=1))
    return np.concatenate(parts)


def counted(routes):
    return np.stack([np.bincount(routes[:, layer].ravel(), minlength=16) for layer in range(routes.shape[1])])


@pytest.mark.parametrize("slots", [4, 6])
def test_what_is_given_back_for_other_tokens_is_little(slots):
    routes = skewed_routes(0)
    loads, slots_per_gpu = counted(routes), [slots] * 4
    unaware = problem_of(loads, slots_per_gpu)
    aware = problem_of(loads, slots_per_gpu, routes)
    plain, _, _ = solve_balance(unaware, SolverSettings(time_limit_s=30), silent)
    hardened, bound, _ = solve_balance(aware, SolverSettings(time_limit_s=30), silent)
    eplb = layer_loads(eplb_slots(loads, slots_per_gpu), loads)
    assert hardened != plain
    assert aware.value(hardened) <= unaware.value(plain) + balance_module.GIVEN_BACK
    assert aware.value(hardened) <= eplb.mean()
    assert layer_loads(hardened, loads).max() <= eplb.max() * (1 + 1e-9)
    assert bound <= unaware.value(plain) + 1e-9


def test_hardening_keeps_the_limit_and_lowers_the_tail():
    rng = np.random.default_rng(0)
    loads = rng.integers(50, 150, 16)
    samples = loads * rng.lognormal(0, np.where(np.arange(16) < 4, 0.8, 0.1), (64, 16))
    start = search_balance(loads, eplb_slots(loads[None], [5] * 4)[0], 0.0, 20, np.random.default_rng(0))
    limit = busiest_load(loads, start) * 1.002
    found = harden(loads, samples, start, limit, 20, np.random.default_rng(0))
    assert busiest_load(loads, found) <= limit
    assert tail_load(samples, found) < tail_load(samples, start)
    assert [len(held) for held in found] == [5] * 4


def test_same_seed_same_plan():
    routes = skewed_routes(0)
    problem = problem_of(counted(routes), [6] * 4, routes)
    settings_ = SolverSettings(seed=3, time_limit_s=60)
    assert solve_balance(problem, settings_, silent)[0] == solve_balance(problem, settings_, silent)[0]


def test_the_time_limit_cuts_and_says_so():
    loads = np.random.default_rng(0).zipf(1.3, (10, 64)).clip(0, 10**5)
    problem = problem_of(loads, [9] * 8)
    started = time.process_time()
    found, bound, notes = solve_balance(problem, SolverSettings(time_limit_s=0.01), silent)
    assert time.process_time() - started < 5
    assert any("time limit" in note for note in notes)
    assert bound <= problem.value(found) <= layer_loads(eplb_slots(loads, [9] * 8), loads).mean() + 1e-12


def test_ctrl_c_returns_the_plan_found_until_then():
    loads = np.random.default_rng(0).zipf(1.3, (4, 32)).clip(0, 10**5)
    problem = problem_of(loads, [5] * 8)
    lines = []

    def interrupt(line):
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    found, bound, notes = solve_balance(problem, SolverSettings(), interrupt)
    check_slots(found, 32, range(4))
    assert "gap" in lines[0]
    assert any("interrupted" in note for note in notes)
    assert bound <= problem.value(found) <= layer_loads(eplb_slots(loads, [5] * 8), loads).mean() + 1e-12


def test_a_production_shape_is_near_the_bound():
    ranks = np.arange(1, 257) ** -0.8
    loads = np.stack([np.random.default_rng(layer).permutation(ranks * 1e5).astype(int) for layer in range(3)])
    problem = problem_of(loads, [9] * 32)
    found, bound, _ = solve_balance(problem, SolverSettings(time_limit_s=20), silent)
    value = problem.value(found)
    assert value < layer_loads(eplb_slots(loads, [9] * 32), loads).mean()
    assert value - bound < 0.002
