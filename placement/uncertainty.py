"""How sure a comparison of plans is: intervals of their figures, and of their differences on the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.bootstrap import Interval, load_intervals, step_intervals, token_intervals
from placement.metrics import Metrics
from placement.settings import Judge

#: The plan that others are compared with, where it is there.
REFERENCE = "step_time"


@dataclass(frozen=True)
class BatchUncertainty:
    """How sure the figures of one plan and batch size are.

    Attributes:
        intervals: by name of the metric; None where too little was resampled (see ``placement.bootstrap``).
        reference: the plan of the row ``step_time``, where there is one, else the plan with the least ``step_us`` of
            this batch size. The latter was chosen by what it is compared on: differences to it are a little too large.
        minus_reference: this plan's ``step_us`` minus the reference's, on the same steps.
        minus_reference_interval: of that difference, from the same resamples of steps for both.
    """

    intervals: Mapping[str, Interval | None]
    reference: str
    minus_reference: float
    minus_reference_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """The ends of all intervals, and the difference to the reference, by flat names."""
        intervals = {**self.intervals, "step_us_minus_reference": self.minus_reference_interval}
        ends = {
            f"{name}_{end}": None if interval is None else getattr(interval, end)
            for name, interval in intervals.items()
            for end in ("low", "high")
        }
        return {"reference": self.reference, "step_us_minus_reference": self.minus_reference} | ends


@dataclass(frozen=True)
class Fastest:
    """Which plan has the least step time at a batch size.

    Attributes:
        batch_size: tokens per step.
        plans: the fastest; several where they take the same time.
        next_plan: the next one, or None.
        ahead_us, ahead: by how much ``plans`` are faster, in µs and as a share of the next plan's time.
        interval: of ``ahead_us``, on the same steps for both.
    """

    batch_size: int
    plans: tuple[str, ...]
    next_plan: str | None
    ahead_us: float
    ahead: float
    interval: Interval | None


def uncertainty_of(judged: Mapping[str, Metrics], judge: Judge) -> dict[str, dict[int, BatchUncertainty]]:
    """Intervals of every plan's figures and of its difference to the reference plan, by plan and batch size.

    Args:
        judged: metrics by plan, all of the same tokens, batch sizes, steps and seed, with sums by sequence.
        judge: how they were judged.
    """
    found: dict[str, dict[int, BatchUncertainty]] = {name: {} for name in judged}
    loads = {name: _load_intervals(metrics, judge) for name, metrics in judged.items()}
    for size in next(iter(judged.values())).by_batch_size if judged else ():
        samples = {name: metrics.samples[size] for name, metrics in judged.items()}
        least = min(samples, key=lambda name: float(samples[name].step_us.mean()))
        reference = REFERENCE if REFERENCE in samples else least
        differences = {name: drawn.step_us - samples[reference].step_us for name, drawn in samples.items()}
        columns = [(drawn.step_us, drawn.active_ratio, differences[name]) for name, drawn in samples.items()]
        intervals = step_intervals(np.concatenate(columns), judge.resamples, judge.seed)
        for index, (name, drawn) in enumerate(samples.items()):
            step, active, minus_reference = intervals[3 * index : 3 * index + 3]
            of_plan = {"step_us": step, "active_ratio": active} | loads[name]
            of_plan |= token_intervals(drawn.token_sums, judge.resamples, judge.seed)
            difference = float(differences[name].mean())
            found[name][size] = BatchUncertainty(of_plan, reference, difference, minus_reference)
    return found


def fastest(judged: Mapping[str, Metrics], batch_size: int, judge: Judge) -> Fastest:
    """The plan with the least step time at a batch size, and how far the next one is behind it.

    Args:
        judged: metrics by plan, at least one, as for ``uncertainty_of``.
        batch_size: one that was judged.
        judge: how they were judged.
    """
    times = {name: metrics.samples[batch_size].step_us for name, metrics in judged.items()}
    means = {name: float(step_us.mean()) for name, step_us in times.items()}
    ranked = sorted(means, key=lambda name: means[name])
    first = tuple(name for name in ranked if means[name] == means[ranked[0]])
    if len(first) == len(ranked):
        return Fastest(batch_size, first, None, 0.0, 0.0, None)
    second = ranked[len(first)]
    (interval,) = step_intervals((times[second] - times[ranked[0]])[None], judge.resamples, judge.seed)
    behind = means[second] - means[ranked[0]]
    return Fastest(batch_size, first, second, behind, behind / means[second], interval)


def _load_intervals(metrics: Metrics, judge: Judge) -> dict[str, Interval | None]:
    assert metrics.sequence_loads is not None
    return load_intervals(metrics.sequence_loads, judge.resamples, judge.seed)
