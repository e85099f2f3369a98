"""The strategies to compare with: by definition where they are greedy, valid always."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.metrics import even_locality
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import check_slots, share_experts
from placement.strategies import solve
from placement.strategies.eplb import copy_counts, eplb_slots, hierarchical_eplb_slots, pack_layer
from placement.strategies.lina import lina_slots, pack_first_fit, proportional_copies
from tests.support.placement_problems import cluster_of, random_statistics

QUICK = SolverSettings(time_limit_s=20.0)
BASELINES = ["eplb", "eplb_hierarchical", "lina", "exflow", "moetuner"]
TOP1 = Objective("locality", "top1")


@st.composite
def budgets(draw):
    """Experts, slots per GPU and the GPUs of a node."""
    num_experts, num_gpus = draw(st.integers(1, 10)), draw(st.integers(1, 5))
    slots = draw(st.lists(st.integers(0, num_experts), min_size=num_gpus, max_size=num_gpus))
    if sum(slots) < num_experts:
        slots[draw(st.integers(0, num_gpus - 1))] = num_experts
    per_node = draw(st.sampled_from([size for size in range(1, num_gpus + 1) if num_gpus % size == 0]))
    return num_experts, slots, per_node


def check_budget(slots, num_experts, slots_per_gpu):
    check_slots(slots, num_experts, range(len(slots)))
    for layer in slots:
        assert all(len(held) <= budget for held, budget in zip(layer, slots_per_gpu, strict=True))


@settings(max_examples=40, deadline=None)
@given(budgets(), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from(BASELINES))
def test_every_plan_is_valid_and_repeatable(budget, num_layers, seed, strategy):
    num_experts, slots, per_node = budget
    problem = PlacementProblem(
        random_statistics(seed, num_layers, num_experts),
        tuple(slots),
        TOP1,
        cluster=cluster_of(len(slots) // per_node, per_node),
    )
    first = solve(strategy, problem, QUICK)
    check_budget(first.slots, num_experts, slots)
    if not any("time limit" in note or "cut off" in note for note in first.notes):
        assert solve(strategy, problem, QUICK).slots == first.slots
    if first.bound is not None:
        assert first.bound >= first.value - 1e-12


# EPLB


def eplb_by_definition(loads, slots_per_gpu):
    """EPLB's global policy with nothing but its definition, for equal GPUs."""
    num_gpus, counts = len(slots_per_gpu), [1] * len(loads)
    for _ in range(min(sum(slots_per_gpu), num_gpus * len(loads)) - len(loads)):
        open_experts = [e for e in range(len(loads)) if counts[e] < num_gpus]
        counts[max(open_experts, key=lambda e: (loads[e] / counts[e], -e))] += 1
    gpus, filled = [[] for _ in slots_per_gpu], [0.0] * num_gpus
    for expert in sorted(range(len(loads)), key=lambda e: (-loads[e] / counts[e], e)):
        for _ in range(counts[expert]):
            lacking = [g for g in range(num_gpus) if len(gpus[g]) < slots_per_gpu[g] and expert not in gpus[g]]
            if not lacking:
                return None
            target = min(lacking, key=lambda g: (filled[g], g))
            gpus[target].append(expert)
            filled[target] += loads[expert] / counts[expert]
    return gpus


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_eplb_follows_its_definition(num_gpus, num_experts, seed):
    rng = np.random.default_rng(seed)
    per_gpu = int(rng.integers(-(-num_experts // num_gpus), num_experts + 1))
    loads = rng.zipf(1.3, size=num_experts).clip(0, 10**6) if seed % 2 else rng.integers(0, 5, num_experts)
    expected = eplb_by_definition(loads.tolist(), [per_gpu] * num_gpus)
    packed = pack_layer(loads, copy_counts(loads, [per_gpu] * num_gpus), [per_gpu] * num_gpus)
    if expected is None:  # room has to be made by moving another expert
        assert [len(held) for held in packed] == [per_gpu] * num_gpus
    else:
        assert packed == expected


@settings(max_examples=60, deadline=None)
@given(budgets(), st.integers(0, 10**6))
def test_hierarchical_eplb_keeps_copies_within_a_node(budget, seed):
    num_experts, slots_per_gpu, per_node = budget
    loads = np.random.default_rng(seed).zipf(1.3, (2, num_experts)).clip(0, 10**6)
    slots = hierarchical_eplb_slots(loads, slots_per_gpu, per_node)
    check_budget(slots, num_experts, slots_per_gpu)
    per_node_slots = [sum(slots_per_gpu[g : g + per_node]) for g in range(0, len(slots_per_gpu), per_node)]
    for layer in slots:
        nodes = [set().union(*layer[g : g + per_node]) for g in range(0, len(layer), per_node)]
        assert [len(experts) for experts in nodes] == share_experts(num_experts, per_node_slots)
        assert sum(map(len, nodes)) == num_experts
    if per_node == len(slots_per_gpu):
        assert slots == eplb_slots(loads, slots_per_gpu)


def test_hierarchical_eplb_by_hand():
    loads = np.array([[90, 60, 40, 30, 20, 10]])
    # Nodes: {90, 30, 10} and {60, 40, 20}; a copy of 90 (45 each) and one of 60 (30 each) fill the fourth slots.
    slots = hierarchical_eplb_slots(loads, [2, 2, 2, 2], 2)
    assert slots == (((0, 3), (0, 5), (1, 2), (1, 4)),)


# Lina


def test_lina_by_hand():
    # 4 at most for 50, 1 at least for 5; the other 7 slots over 45 tokens: 3.89, 1.87, 1.24, rounded 4, 2, 1.
    assert proportional_copies(np.array([50, 25, 12, 8, 5]), [3, 3, 3, 3]).tolist() == [4, 4, 2, 1, 1]
    assert proportional_copies(np.array([0, 0, 0]), [2, 2]).tolist() == [1, 1, 1]
    assert proportional_copies(np.array([9, 0, 0]), [3, 3]).tolist() == [2, 1, 1]
    # Capacity 50: 40 on GPU 0, 30 and 20 on GPU 1, 10 on GPU 0.
    assert pack_first_fit(np.array([40, 30, 20, 10]), np.ones(4, dtype=int), [2, 2]) == [[0, 3], [1, 2]]
    # Capacity 30: first fit takes GPU 0 for the third although GPU 1 has as much room.
    assert pack_first_fit(np.array([25, 25, 5, 5]), np.ones(4, dtype=int), [2, 2]) == [[0, 2], [1, 3]]
    # Capacity 30: the third fits nowhere, and the least loaded GPU has no free slot.
    assert pack_first_fit(np.array([21, 20, 19]), np.ones(3, dtype=int), [2, 1]) == [[0, 2], [1]]


@settings(max_examples=100, deadline=None)
@given(budgets(), st.integers(0, 10**6))
def test_lina_copies_follow_popularity_and_keep_the_budget(budget, seed):
    num_experts, slots_per_gpu, _ = budget
    rng = np.random.default_rng(seed)
    loads = rng.zipf(1.3, num_experts).clip(0, 10**6) if seed % 2 else rng.integers(0, 5, num_experts)
    counts = proportional_copies(loads, slots_per_gpu)
    most = sum(1 for slots in slots_per_gpu if slots)
    assert counts.min() >= 1
    assert counts.max() <= most
    assert counts.sum() == min(sum(slots_per_gpu), np.where(loads > 0, most, 1).sum())
    assert (np.diff(counts[np.argsort(loads, kind="stable")]) >= -1).all()
    slots = lina_slots(loads[None], slots_per_gpu)
    check_budget(slots, num_experts, slots_per_gpu)
    if len(set(slots_per_gpu)) == 1:
        assert Counter(e for held in slots[0] for e in held) == dict(enumerate(counts.tolist()))


def test_baselines_on_the_real_trace(real_trace):
    """One second each is enough to be sound on 24 layers × 32 experts."""
    from profiler.statistics import collect_statistics

    statistics = collect_statistics(real_trace, real_trace.split_mask("even"))
    problem = PlacementProblem(statistics, (8,) * 4, TOP1)
    fast = SolverSettings(time_limit_s=1.0)
    locality = {name: solve(name, problem, fast).value for name in ["contiguous", *BASELINES]}
    assert locality["exflow"] > 0.65 > locality["moetuner"] > locality["contiguous"]
    balance = replace(problem, objective=Objective("balance"))
    load = {name: solve(name, balance, fast).value for name in ["contiguous", *BASELINES]}
    assert max(load["eplb"], load["lina"], load["moetuner"]) < 1.1 < load["contiguous"] < load["exflow"]
    assert load["eplb"] == load["eplb_hierarchical"]
    assert even_locality(solve("moetuner", balance, fast).slots, statistics.affinity) > 0.25
