"""Why a section of the page has nothing to show."""

from __future__ import annotations

from profiler.profile import RoutingProfile

COUNTS_ALONE = "The source holds only counts per expert; profile a trace with every token's routes to see this."
ONE_LAYER = "The source has one MoE layer, so no layer follows another."
NOT_COMPUTED = "This was not computed for the source."


def missing_sections(profile: RoutingProfile) -> dict[str, str]:
    """One sentence for every section of the page that has no numbers, by the section's name."""
    several = len(profile.source.layer_ids) > 1
    between_layers = NOT_COMPUTED if several else ONE_LAYER
    reasons = {
        "affinity": None if several else ONE_LAYER,
        "coactivation": None,
        "information": between_layers if profile.information is None else None,
        "potentials": None if profile.potentials else between_layers,
        "active": NOT_COMPUTED if profile.active is None else None,
        "convergence": _convergence(several) if profile.convergence is None else None,
        "domains": "The trace names fewer than two domains; record prompts with a domain each to see how they differ."
        if profile.domain_drift is None
        else None,
        "time": "The trace has too few sequences to compare windows of time." if profile.time_drift is None else None,
        "predictors": None if profile.predictors else "Predictors were not judged on this trace.",
    }
    if profile.statistics is None:
        return dict.fromkeys(reasons, COUNTS_ALONE)
    return {section: reason for section, reason in reasons.items() if reason is not None}


def _convergence(several: bool) -> str:
    return "The trace has too few tokens to tell when its affinity settles." if several else ONE_LAYER
