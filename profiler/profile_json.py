"""A profile as JSON: every figure of `stats`, without the tables of pairs (those are in its safetensors output)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from profiler.measures import entropy_bits, gini, popularity_skew
from profiler.profile import RoutingProfile


def profile_to_dict(profile: RoutingProfile) -> dict[str, Any]:
    """Plain values only; arrays become nested lists, rounded to 6 digits.

    Args:
        profile: of a trace or of counts.
    """
    parts = ("source", "information", "active", "convergence", "domain_drift", "time_drift")
    groups = {"all": profile.popularity, **profile.popularity_by_phase}
    groups |= {f"domain: {name}": counts for name, counts in profile.popularity_by_domain.items()}
    return {
        "format": "routing-profile",
        "version": 1,
        **{name: _plain(None if (part := getattr(profile, name)) is None else asdict(part)) for name in parts},
        "tokens": {**profile.tokens_by_phase, **{f"domain: {n}": t for n, t in profile.tokens_by_domain.items()}},
        "popularity": profile.popularity.tolist(),
        "popularity_by_phase": {name: counts.tolist() for name, counts in profile.popularity_by_phase.items()},
        "busiest_over_mean": {name: _plain(popularity_skew(counts)) for name, counts in groups.items()},
        "gini": {name: _plain(gini(counts)) for name, counts in groups.items()},
        "entropy_bits": {name: _plain(entropy_bits(counts)) for name, counts in groups.items()},
        "potentials": [_plain(asdict(potential)) for potential in profile.potentials],
        "predictors": [_plain(asdict(score)) for score in profile.predictors],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    return round(value, 6) if isinstance(value, float) else value
