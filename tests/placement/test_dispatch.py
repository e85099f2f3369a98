"""The dispatch rules ``level`` and ``nearest``: shared cases, optimality, and the compiled form."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.dispatch import INACTIVE, SPLIT, dispatch_tokens, level_dispatch, level_dispatch_steps

CASES = json.loads((Path(__file__).parents[1] / "data" / "level_dispatch_cases.json").read_text())
EXPERT_CASES = [case for case in CASES if "chosen" in case]
TOKEN_CASES = [case for case in CASES if "gpus" in case]


@pytest.mark.parametrize("case", EXPERT_CASES, ids=lambda case: case["name"])
def test_shared_cases_of_experts(case):
    chosen = level_dispatch(
        np.array(case["tokens_per_expert"]), np.array(case["copies"]), case["num_gpus"], case["split_above_tokens"]
    )
    assert chosen.tolist() == case["chosen"]
    steps = level_dispatch_steps(
        np.array([case["tokens_per_expert"]]), np.array(case["copies"]), case["num_gpus"], case["split_above_tokens"]
    )
    assert steps.tolist() == [case["chosen"]]


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case["name"])
def test_shared_cases_of_tokens(case):
    gpus = dispatch_tokens(
        np.array(case["experts"]),
        np.array(case["copies"]),
        case["num_gpus"],
        case["split_above_tokens"],
        np.array(case["homes"]) if "homes" in case else None,
    )
    assert gpus.tolist() == case["gpus"]


def test_no_tokens_at_all():
    gpus = dispatch_tokens(np.zeros((0, 2), dtype=np.int64), np.array([[0], [1]]), 2, None)
    assert gpus.shape == (0, 2)


@st.composite
def layers(draw, most_experts=6, most_gpus=4):
    """Copies [E, C], GPUs, tokens per expert, split limit."""
    num_gpus = draw(st.integers(1, most_gpus))
    num_experts = draw(st.integers(1, most_experts))
    holders = [
        sorted(draw(st.sets(st.integers(0, num_gpus - 1), min_size=1, max_size=num_gpus))) for _ in range(num_experts)
    ]
    copies = np.full((num_experts, max(map(len, holders))), -1, dtype=np.int32)
    for expert, gpus in enumerate(holders):
        copies[expert, : len(gpus)] = gpus
    tokens = np.array(draw(st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)))
    return tokens, copies, num_gpus, draw(st.sampled_from([None, 0, 3]))


def loads_of(chosen, copies, num_gpus):
    load = np.zeros(num_gpus, dtype=int)
    for expert, gpu in enumerate(chosen):
        if gpu == SPLIT:
            load[copies[expert][copies[expert] >= 0]] += 1
        elif gpu != INACTIVE:
            load[gpu] += 1
    return load


@settings(max_examples=200, deadline=None)
@given(layers())
def test_busiest_gpu_has_as_few_active_experts_as_possible(layer):
    tokens, copies, num_gpus, limit = layer
    chosen = level_dispatch(tokens, copies, num_gpus, limit)
    options = []
    for expert, count in enumerate(tokens):
        holders = copies[expert][copies[expert] >= 0].tolist()
        if count == 0:
            options.append([INACTIVE])
        elif limit is not None and len(holders) > 1 and count > limit:
            options.append([SPLIT])
        else:
            options.append(holders)
        assert chosen[expert] in options[-1]
    least = min(loads_of(choice, copies, num_gpus).max() for choice in product(*options))
    assert loads_of(chosen, copies, num_gpus).max() == least


@settings(max_examples=60, deadline=None)
@given(layers(most_experts=20, most_gpus=8), st.integers(0, 2**32 - 1))
def test_steps_at_once_equal_steps_one_by_one(layer, seed):
    _, copies, num_gpus, limit = layer
    tokens = np.random.default_rng(seed).poisson(1.0, size=(30, len(copies)))
    together = level_dispatch_steps(tokens, copies, num_gpus, limit)
    one_by_one = np.stack([level_dispatch(row, copies, num_gpus, limit) for row in tokens])
    np.testing.assert_array_equal(together, one_by_one)


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 2**32 - 1))
def test_tokens_go_where_their_expert_was_sent_and_splits_are_even(layer, seed):
    _, copies, num_gpus, limit = layer
    experts = np.random.default_rng(seed).integers(len(copies), size=(7, 2))
    gpus = dispatch_tokens(experts, copies, num_gpus, limit)
    chosen = level_dispatch(np.bincount(experts.ravel(), minlength=len(copies)), copies, num_gpus, limit)
    for expert in np.unique(experts):
        mine = gpus[experts == expert]
        if chosen[expert] != SPLIT:
            assert (mine == chosen[expert]).all()
            continue
        holders = copies[expert][copies[expert] >= 0]
        runs = np.bincount(np.searchsorted(holders, mine), minlength=len(holders))
        assert (np.diff(mine) >= 0).all()
        assert runs.sum() == len(mine)
        assert runs.max() - runs.min() <= 1


def test_hundreds_of_gpus_and_experts():
    rng = np.random.default_rng(0)
    num_experts, num_gpus = 512, 320
    copies = np.full((num_experts, 5), -1)
    for row in copies:
        held = np.sort(rng.choice(num_gpus, size=rng.integers(1, 6), replace=False))
        row[: len(held)] = held
    tokens = rng.poisson(0.8, size=(3, num_experts))
    together = level_dispatch_steps(tokens, copies, num_gpus, 2)
    one_by_one = [level_dispatch(row, copies, num_gpus, 2) for row in tokens]
    np.testing.assert_array_equal(together, one_by_one)


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 2**32 - 1))
def test_nearest_serves_at_home_what_it_can_and_the_rest_as_if_alone(layer, seed):
    _, copies, num_gpus, limit = layer
    rng = np.random.default_rng(seed)
    experts = rng.integers(len(copies), size=(7, 2))
    homes = rng.integers(-1, num_gpus, size=7)
    gpus = dispatch_tokens(experts, copies, num_gpus, limit, homes)
    kept = np.array([[homes[t] >= 0 and homes[t] in copies[e] for e in row] for t, row in enumerate(experts)])
    assert (gpus == homes[:, None])[kept].all()
    rest = dispatch_tokens(experts[~kept][:, None], copies, num_gpus, limit)
    assert gpus[~kept].tolist() == rest.ravel().tolist()
    np.testing.assert_array_equal(
        dispatch_tokens(experts, copies, num_gpus, limit, np.full(7, -1)),
        dispatch_tokens(experts, copies, num_gpus, limit),
    )


def test_reading_a_plan_needs_no_compiler():
    program = "import sys, placement.dispatch, placement.evaluation; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
