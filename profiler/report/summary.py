"""What a profile says, in plain sentences with their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from profiler.measures import popularity_skew, shares
from profiler.predictors.table import compared
from profiler.profile import Drift, RoutingProfile

CLAIMED_TOKENS = (1000, 3000)  # ExFlow, section 5: tokens until the affinity is stable
EVEN_SKEW = 1.25  # busiest / mean up to which routing counts as even
EVEN_LOAD = 1.15  # busiest GPU / mean up to which load counts as even
BEYOND_CONTROL = 1.5  # times the control from which a measure counts as real


@dataclass(frozen=True)
class Finding:
    """One sentence of the summary.

    Attributes:
        figure: its most important number, with unit.
        text: the sentence.
    """

    figure: str
    text: str


def summarize(profile: RoutingProfile) -> list[Finding]:
    """The findings that the profile has numbers for, most basic first."""
    sentences: tuple[Callable[[RoutingProfile], Finding | None], ...] = (
        _skew,
        _concentration,
        _locality,
        _information,
        _active,
        _convergence,
        _domains,
        _time,
        _predictor,
        _counts_alone,
    )
    return [finding for sentence in sentences if (finding := sentence(profile)) is not None]


def _skew(profile: RoutingProfile) -> Finding:
    skew_L = popularity_skew(profile.popularity)
    counted = skew_L[skew_L > 0]
    if not len(counted):
        return Finding("0", "No expert was chosen at all: the counts are empty.")
    layer = int(skew_L.argmax())
    expert = int(profile.popularity[layer].argmax())
    meaning = (
        "whichever GPU holds the busiest experts gets more work, unless they are spread or copied."
        if counted.mean() > EVEN_SKEW
        else "choices are nearly even."
    )
    return Finding(
        _times(skew_L[layer]),
        f"Layer {profile.source.layer_ids[layer]} is the most skewed: expert {expert} gets {_times(skew_L[layer])} "
        f"its share. Over all layers the busiest expert gets {_times(counted.mean())} on average: {meaning}",
    )


def _concentration(profile: RoutingProfile) -> Finding | None:
    num_experts = profile.source.num_experts
    counted_LE = profile.popularity[profile.popularity.sum(axis=1) > 0]
    if num_experts < 4 or not len(counted_LE):
        return None
    quarter = num_experts // 4
    busiest = float(np.sort(shares(counted_LE), axis=1)[:, -quarter:].sum(axis=1).mean())
    unused = int((profile.popularity == 0).sum())
    never = f"{unused:,} of {profile.popularity.size:,} experts were never chosen" if unused else "every expert is used"
    return Finding(
        _percent(busiest),
        f"The busiest quarter of a layer's experts gets {_percent(busiest)} of its choices, where even routing would "
        f"give {_percent(quarter / num_experts)}; {never}.",
    )


def _locality(profile: RoutingProfile) -> Finding | None:
    if not profile.potentials:
        return None
    potential = min(profile.potentials, key=lambda potential: abs(potential.num_gpus - 4))
    load = f"the busiest GPU then gets {_times(potential.max_load)} its share in the worst layer"
    text = (
        f"Placing by affinity can keep up to {_percent(potential.kept)} of pairs on one of {potential.num_gpus} GPUs "
        f"(contiguous {_percent(potential.contiguous)})"
    )
    if potential.max_load > EVEN_LOAD:
        return Finding(_percent(potential.kept), f"{text}, but {load}: load must be bounded.")
    return Finding(_percent(potential.kept), f"{text}, and load stays even: {load}.")


def _information(profile: RoutingProfile) -> Finding | None:
    if profile.information is None:
        return None
    bits, chance = float(profile.information.pairs.mean()), float(profile.information.pairs_shuffled.mean())
    meaning = (
        "routes are linked across layers, so placement by affinity has something to work with."
        if bits > BEYOND_CONTROL * chance
        else "no more than chance gives, so placement by affinity has nothing to gain."
    )
    return Finding(
        f"{bits:.3f} bits",
        f"An expert of one layer tells {bits:.3f} bits about the token's experts in the next, against {chance:.3f} "
        f"bits with tokens shuffled: {meaning}",
    )


def _active(profile: RoutingProfile) -> Finding | None:
    active = profile.active
    if active is None:
        return None
    wanted = [at for at, batch in enumerate(active.batch_sizes) if batch in (1, 8, 32)] or [0]
    batches = _listed([str(active.batch_sizes[at]) for at in wanted])
    mixed = [f"{active.mixed[at].mean():.1f}" for at in wanted]
    uniform = _listed([f"{active.uniform[at]:.1f}" for at in wanted])
    num_experts = profile.source.num_experts
    tokens = "tokens" if batches != "1" else "token"
    return Finding(
        f"{mixed[-1]} of {num_experts}",
        f"A step over {batches} {active.phase} {tokens} reads the weights of {_listed(mixed)} of {num_experts} experts "
        f"per layer on average (uniform routing: {uniform}): the time of small batches follows this number, not the "
        "number of tokens.",
    )


def _convergence(profile: RoutingProfile) -> Finding | None:
    convergence = profile.convergence
    if convergence is None:
        return None
    low, high = CLAIMED_TOKENS
    claim = f"the {low:,}–{high:,} that ExFlow claims"
    stable = convergence.stable_at
    if stable >= int(convergence.tokens[-1]):
        text = f"The affinity is still moving at {stable:,} tokens, the most that could be judged (ExFlow claims "
        return Finding(f"{stable:,} tokens", f"{text}{low:,}–{high:,} are enough): record more before trusting it.")
    relation = "within" if low <= stable <= high else "fewer than" if stable < low else "more than"
    return Finding(
        f"{stable:,} tokens",
        f"The affinity is stable after {stable:,} tokens, {relation} {claim}; a distance of {convergence.floor:.3f} "
        f"from unseen tokens remains at {int(convergence.tokens[-1]):,}, the most that were counted"
        f"{'; a longer trace may put it later' if convergence.may_come_later else ''}.",
    )


def _domains(profile: RoutingProfile) -> Finding | None:
    if profile.domain_drift is None:
        return None
    name, moved, control = _largest(profile.domain_drift)
    meaning = (
        "a plan made for mixed traffic is not the best one for it."
        if moved > BEYOND_CONTROL * control
        else "no more than chance gives, so one plan serves all domains."
    )
    return Finding(
        _percent(moved),
        f"Domain “{name}” differs furthest beyond chance from the whole trace: {_percent(moved)} of its choices "
        f"would have to change to match it ({_percent(control)} for as many sequences at random): {meaning}",
    )


def _time(profile: RoutingProfile) -> Finding | None:
    if profile.time_drift is None:
        return None
    name, moved, control = _largest(profile.time_drift)
    meaning = (
        "routing changes along the recording, so a plan ages."
        if moved > BEYOND_CONTROL * control
        else "close to chance, so a plan from one part of the recording serves the rest."
    )
    return Finding(
        _percent(moved),
        f"Over time, window {name} of {len(profile.time_drift.names)} differs furthest beyond chance from the whole: "
        f"{_percent(moved)} of its choices would have to change ({_percent(control)} for as many sequences at random): "
        f"{meaning}",
    )


def _predictor(profile: RoutingProfile) -> Finding | None:
    if not profile.predictors:
        return None
    rates = {score.predictor: float(score.hit_rate[kept].mean()) for score, kept in compared(profile.predictors)}
    best = max(profile.predictors, key=lambda score: rates[score.predictor])
    rate, top_k = rates[best.predictor], profile.source.top_k
    guess = "" if top_k is None else f", where guessing finds {_percent(top_k / profile.source.num_experts)}"
    return Finding(
        _percent(rate),
        f"The best predictor is {best.predictor} ({best.description}): it names {_percent(rate)} of a token's experts "
        f"before the layer's router has run{guess}; fetching as many ahead misses the rest.",
    )


def _counts_alone(profile: RoutingProfile) -> Finding | None:
    if profile.statistics is not None:
        return None
    return Finding(
        f"{int(profile.popularity.sum()):,}",
        f"The source holds {int(profile.popularity.sum()):,} choices as counts per expert alone: enough to judge load, "
        "not affinity, co-activation, active experts or drift.",
    )


def _largest(drift: Drift) -> tuple[str, float, float]:
    """The group farthest from the whole beyond its control: name, distance, control."""
    at = int((drift.to_all - drift.to_all_control).argmax())
    return drift.names[at], float(drift.to_all[at]), float(drift.to_all_control[at])


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _times(value: float) -> str:
    return f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value >= 0.0995 else f"{value:.1%}"
