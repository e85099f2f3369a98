"""The numbers behind the page's charts, as plain lists for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from profiler.measures import gini, popularity_skew
from profiler.profile import Drift, RoutingProfile
from profiler.report.matrices import encode_matrix, next_layer_shares, same_layer_shares
from profiler.report.options import popularity_views

DIGITS = 6  # of a number in the page


def figures_data(profile: RoutingProfile) -> dict[str, Any]:
    """Everything the script draws, by chart; charts whose numbers are missing are None.

    Returns:
        A dictionary of lists, strings and numbers, without NaN: what cannot be computed is None.
    """
    source, statistics = profile.source, profile.statistics
    chance = None if statistics is None else statistics.popularity / max(statistics.num_tokens, 1)
    several = len(source.layer_ids) > 1
    layers = range(len(source.layer_ids))
    return {
        "layers": list(source.layer_ids),
        "experts": source.num_experts,
        "popularity": [
            {"label": view.label, "group": view.group, "counts": view.counts.tolist()}
            for view in popularity_views(profile)
        ],
        "skew": _skew(profile.popularity),
        "chance": None if chance is None else plain(chance),
        "affinity": None
        if statistics is None or not several
        else [encode_matrix(next_layer_shares(statistics, layer)) for layer in layers[:-1]],
        "coactivation": None
        if statistics is None
        else [encode_matrix(same_layer_shares(statistics, layer)) for layer in layers],
        "information": _fields(profile.information, "pairs", "pairs_shuffled", "top1", "top1_shuffled"),
        "active": _active(profile),
        "convergence": _fields(profile.convergence, "tokens", "distance", "floor", "stable_at"),
        "domains": _drift(profile.domain_drift),
        "time": _drift(profile.time_drift),
        "predictors": [
            {"name": score.predictor, "layers": list(score.layer_ids), "hit_rate": plain(score.hit_rate)}
            for score in profile.predictors
        ],
    }


def plain(values: Any) -> Any:
    """Arrays and numpy's numbers as nested lists of Python's, rounded to six digits; None for NaN and infinity."""
    if isinstance(values, np.ndarray):
        return [plain(value) for value in values.tolist()]
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    if isinstance(values, float | np.floating):
        return float(f"{values:.{DIGITS}g}") if np.isfinite(values) else None
    return values


def _fields(value: Any, *names: str) -> dict[str, Any] | None:
    return None if value is None else {name: plain(getattr(value, name)) for name in names}


def _skew(popularity_LE: np.ndarray) -> dict[str, Any]:
    """Layers without any choice have no skew."""
    counted_L = popularity_LE.sum(axis=1) > 0
    return {
        "max_over_mean": plain(np.where(counted_L, popularity_skew(popularity_LE), np.nan)),
        "gini": plain(np.where(counted_L, gini(popularity_LE), np.nan)),
    }


def _active(profile: RoutingProfile) -> dict[str, Any] | None:
    active = profile.active
    if active is None:
        return None
    same = active.same_domain
    return {
        "phase": active.phase,
        "batches": list(active.batch_sizes),
        "mixed": plain(active.mixed.mean(axis=1)),
        "lowest": plain(active.mixed.min(axis=1)),
        "highest": plain(active.mixed.max(axis=1)),
        "same_domain": None if same is None else plain(same.mean(axis=1)),
        "uniform": plain(active.uniform),
    }


def _drift(drift: Drift | None) -> dict[str, Any] | None:
    return _fields(drift, "names", "tokens", "distance", "to_all", "to_all_control")
