"""What the page's selectors offer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from profiler.profile import RoutingProfile

MOST_DOMAINS = 16  # in the popularity selector: each brings a table of counts into the file


@dataclass(frozen=True)
class PopularityView:
    """One choice of whose tokens the popularity map counts.

    Attributes:
        label: as the selector shows it.
        group: heading in the selector.
        counts: int64 ``[L, E]``.
    """

    label: str
    group: str
    counts: np.ndarray


def popularity_views(profile: RoutingProfile) -> list[PopularityView]:
    """All tokens first, then the phases where there are two, then the domains with the most tokens."""
    views = [PopularityView("All tokens", "Everything", profile.popularity)]
    if len(profile.popularity_by_phase) > 1:
        views += [
            PopularityView(name.capitalize(), "Phase", counts) for name, counts in profile.popularity_by_phase.items()
        ]
    tokens = profile.tokens_by_domain
    largest = set(sorted(tokens, key=lambda name: -tokens[name])[:MOST_DOMAINS])
    views += [
        PopularityView(name, "Domain", counts)
        for name, counts in profile.popularity_by_domain.items()
        if name in largest
    ]
    return views


def layer_options(profile: RoutingProfile) -> list[str]:
    """Every MoE layer."""
    return [f"Layer {layer}" for layer in profile.source.layer_ids]


def pair_options(profile: RoutingProfile) -> list[str]:
    """Every MoE layer with the next one."""
    return [f"Layer {here} to layer {following}" for here, following in pairwise(profile.source.layer_ids)]
