"""From measured times to the cost model's coefficients: least squares of relative errors, none below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from placement.cluster import Link

SLOWEST_BYTES_PER_S = 1e15  # where larger messages take no longer than small ones, the bandwidth is beyond measuring


@dataclass(frozen=True)
class Fit:
    """Coefficients and how well they tell the times they come from.

    Attributes:
        values: one per column.
        median_error: of |predicted / measured - 1|.
        max_error: likewise.
    """

    values: tuple[float, ...]
    median_error: float
    max_error: float


def fit(columns: Sequence[Sequence[float]], times_us: Sequence[float]) -> Fit:
    """Coefficients of the columns ``[N, C]`` that tell times ``[N]`` best, each time weighing by its own size.

    A decode step of one token counts as much as one of a thousand: what is kept small is the relative error.
    """
    matrix, times = np.asarray(columns, dtype=np.float64), np.asarray(times_us, dtype=np.float64)
    scaled = matrix / times[:, None]
    scale = np.maximum(scaled.max(axis=0), 1e-300)  # columns of one size, so that the solver's tolerance fits all
    values = nnls(scaled / scale, np.ones(len(times)))[0] / scale
    errors = np.abs(matrix @ values / times - 1)
    return Fit(tuple(float(value) for value in values), float(np.median(errors)), float(errors.max()))


def fit_link(carried_bytes: Sequence[float], times_us: Sequence[float]) -> tuple[Link, Fit]:
    """A link's latency and bandwidth from the times of messages of different sizes."""
    fitted = fit([[1.0, carried] for carried in carried_bytes], times_us)
    latency_us, us_per_byte = fitted.values
    return Link(
        latency_us / 1e6, min(1e6 / us_per_byte, SLOWEST_BYTES_PER_S) if us_per_byte else SLOWEST_BYTES_PER_S
    ), fitted
