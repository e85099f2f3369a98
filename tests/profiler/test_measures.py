"""Measures on tables whose value is known, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiler.measures import entropy_bits, expected_active, gini, popularity_skew, shares, total_variation

COUNTS = arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.integers(0, 10**6))
KNOWN = np.array([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])


def test_known_layers() -> None:
    np.testing.assert_allclose(popularity_skew(KNOWN), [1, 4, 3, 0])
    np.testing.assert_allclose(gini(KNOWN), [0, 0.75, 0.625, 0], atol=1e-12)
    np.testing.assert_allclose(entropy_bits(KNOWN), [2, 0, 0.8112781245, 0], atol=1e-9)
    np.testing.assert_allclose(shares(KNOWN)[3], 0)


@given(COUNTS)
def test_gini_is_half_the_relative_mean_difference(popularity: np.ndarray) -> None:
    for layer, found in zip(popularity.astype(float), gini(popularity), strict=True):
        total = layer.sum()
        expected = np.abs(layer[:, None] - layer).sum() / (2 * len(layer) * total) if total else 0.0
        assert found == pytest.approx(expected, abs=1e-9)


@given(COUNTS)
def test_bounds(popularity: np.ndarray) -> None:
    num_experts = popularity.shape[1]
    counted = popularity.sum(axis=1) > 0
    assert ((gini(popularity) >= 0) & (gini(popularity) <= 1 - 1 / num_experts + 1e-12)).all()
    assert (popularity_skew(popularity)[counted] >= 1 - 1e-12).all()
    assert (entropy_bits(popularity) <= np.log2(num_experts) + 1e-9).all()
    np.testing.assert_allclose(total_variation(popularity, popularity * 3), 0, atol=1e-12)


def test_total_variation_of_known_counts() -> None:
    assert total_variation(np.array([1, 0]), np.array([0, 5])) == 1
    assert total_variation(np.array([3, 1]), np.array([1, 1])) == pytest.approx(0.25)
    assert total_variation(np.array([0, 0]), np.array([1, 1])) == 0.5
    assert total_variation(np.array([[1, 0], [1, 1]]), np.array([1, 1])).tolist() == [0.5, 0]


def test_expected_active_experts_are_those_of_drawn_batches() -> None:
    generator = np.random.default_rng(0)
    routes_TK = np.stack([generator.choice(6, 2, replace=False, p=[0.4, 0.3, 0.1, 0.1, 0.1, 0]) for _ in range(50)])
    popularity = np.bincount(routes_TK.ravel(), minlength=6)[None]
    expected_BL = expected_active(popularity, 50, (1, 3, 16))
    for batch, expected in zip((1, 3, 16), expected_BL[:, 0], strict=True):
        drawn = routes_TK[generator.integers(50, size=(4000, batch))].reshape(4000, -1)
        assert np.mean([len(set(row)) for row in drawn.tolist()]) == pytest.approx(expected, abs=0.05)
    assert expected_BL[0, 0] == pytest.approx(2.0), "one token has exactly its K experts"
