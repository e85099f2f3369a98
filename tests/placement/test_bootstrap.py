"""Bootstrap intervals against plain loops, known cases, and how often they hold what they are for."""

import numpy as np
import pytest

from placement import bootstrap
from placement.bootstrap import load_intervals, step_intervals, token_intervals
from placement.metrics import TokenSums

R = 300


def sums_of(tokens, gpus, pairs, top1, num_layers=3, top_k=2):
    return TokenSums(*(np.array(column, dtype=np.int64) for column in (tokens, gpus, pairs, top1)), num_layers, top_k)


def plain_interval(values):
    return pytest.approx(tuple(np.percentile(values, [2.5, 97.5])), rel=1e-12)


def test_steps_match_plain_loops_and_are_resampled_alike():
    values = np.random.default_rng(1).gamma(2.0, size=(2, 40))
    drawn = np.random.default_rng(7).integers(40, size=(R, 40))
    first, second, difference = step_intervals(np.stack([*values, values[0] - values[1]]), R, 7)
    assert first == plain_interval([values[0, row].mean() for row in drawn])
    assert second == plain_interval([values[1, row].mean() for row in drawn])
    assert difference == plain_interval([values[0, row].mean() - values[1, row].mean() for row in drawn])


def test_a_constant_difference_has_no_width():
    steps = np.random.default_rng(0).normal(size=500) * 1000
    wide, narrow = step_intervals(np.stack([steps, steps + 1.5 - steps]), R, 0)
    assert wide.half_width > 50
    assert narrow == pytest.approx((1.5, 1.5), abs=1e-9)


def test_the_interval_of_a_mean_holds_the_true_mean_about_95_times_of_100():
    steps = np.random.default_rng(3).exponential(size=(400, 200))
    held = [low <= 1.0 <= high for low, high in step_intervals(steps, R, 0)]
    assert 0.90 <= np.mean(held) <= 0.98


def test_pieces_do_not_change_the_result(monkeypatch):
    steps = np.random.default_rng(1).normal(size=(2, 30))
    loads = np.random.default_rng(2).random((5, 3, 4))
    before = step_intervals(steps, R, 0), load_intervals(loads, R, 0)
    monkeypatch.setattr(bootstrap, "VALUES_AT_ONCE", 100)
    after = step_intervals(steps, R, 0), load_intervals(loads, R, 0)
    for old, new in zip(before[0] + list(before[1].values()), after[0] + list(after[1].values()), strict=True):
        assert new == pytest.approx(old, rel=1e-12)


def test_tokens_match_plain_loops():
    rng = np.random.default_rng(5)
    sums = sums_of(rng.integers(1, 9, 6), rng.integers(9, 20, 6), rng.integers(0, 30, 6), rng.integers(0, 9, 6))
    drawn = np.random.default_rng(0).integers(6, size=(R, 6))
    tokens = sums.tokens[drawn].sum(axis=1)
    found = token_intervals(sums, R, 0)
    assert found["gpus_per_token"] == plain_interval(sums.gpus[drawn].sum(axis=1) / tokens / 3)
    assert found["pair_locality"] == plain_interval(sums.pairs_kept[drawn].sum(axis=1) / tokens / 2 / 4)
    assert found["top1_transition_locality"] == plain_interval(sums.top1_kept[drawn].sum(axis=1) / tokens / 2)


def test_resamples_without_tokens_are_left_out():
    found = token_intervals(sums_of([4, 0], [12, 0], [16, 0], [2, 0]), R, 0)
    assert found == {"gpus_per_token": (1, 1), "pair_locality": (0.5, 0.5), "top1_transition_locality": (0.25, 0.25)}


def test_loads_match_plain_loops():
    loads = np.random.default_rng(4).integers(1, 50, size=(7, 3, 4)).astype(float)
    drawn = np.random.default_rng(2).integers(7, size=(R, 7))
    ratios = np.array([[layer.max() / layer.mean() for layer in loads[row].sum(axis=0)] for row in drawn])
    found = load_intervals(loads, R, 2)
    assert found["load_mean"] == plain_interval(ratios.mean(axis=1))
    assert found["load_max"] == plain_interval(ratios.max(axis=1))


def test_one_step_or_sequence_has_no_interval():
    assert step_intervals(np.ones((3, 1)), R, 0) == [None] * 3
    assert set(token_intervals(sums_of([4], [12], [16], [2]), R, 0).values()) == {None}
    assert load_intervals(np.ones((1, 2, 3)), R, 0) == {"load_mean": None, "load_max": None}
