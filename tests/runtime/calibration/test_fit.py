"""Known coefficients are found again from the times they make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.calibration.fit import SLOWEST_BYTES_PER_S, fit, fit_link

GRID = [(1.0, float(active), float(active * each)) for active in (1, 2, 8, 32, 128) for each in (1, 4, 16, 64)]
microseconds = st.floats(0.01, 100)


@given(microseconds, microseconds, microseconds)
@settings(max_examples=50, deadline=None)
def test_exact_times(c0: float, c1: float, c2: float) -> None:
    found = fit(GRID, [c0 * a + c1 * b + c2 * c for a, b, c in GRID])
    np.testing.assert_allclose(found.values, (c0, c1, c2), rtol=1e-5)
    assert found.max_error < 1e-6


def test_noise_is_told_as_error() -> None:
    noise = np.random.default_rng(0).uniform(0.95, 1.05, len(GRID))
    found = fit(GRID, [(5 * a + 2 * b + 0.1 * c) * n for (a, b, c), n in zip(GRID, noise, strict=True)])
    assert 0.005 < found.median_error <= found.max_error < 0.1
    np.testing.assert_allclose(found.values[1], 2, rtol=0.05)


def test_a_model_that_does_not_fit_says_so() -> None:
    assert fit(GRID, [1 + (a * b) ** 2 for a, b, _ in GRID]).max_error > 0.5


def test_no_coefficient_is_negative() -> None:
    assert min(fit(GRID, [100 + 1e-3 * b for _, b, _ in GRID]).values) >= 0
    assert fit(GRID, [100.0 for _ in GRID]).values == pytest.approx((100, 0, 0), abs=1e-9)


def test_link() -> None:
    carried = [2.0**n for n in range(8, 24)]
    link, found = fit_link(carried, [12 + n / 3e5 for n in carried])
    assert link.latency_s == pytest.approx(12e-6)
    assert link.bytes_per_s == pytest.approx(3e11)
    assert found.max_error < 1e-9
    assert fit_link(carried, [7.0 for _ in carried])[0].bytes_per_s == SLOWEST_BYTES_PER_S
