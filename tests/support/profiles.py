"""Profiles with every field filled: counts of seeded synthetic routing, the other figures plausible and random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.placement_generators import SyntheticRouting, count_routes
from profiler.measures import expected_active
from profiler.profile import (
    ActiveExperts,
    Convergence,
    Drift,
    Information,
    LocalityPotential,
    PredictorScore,
    ProfiledSource,
    RoutingProfile,
)
from profiler.profile_builder import profile_counts
from profiler.routing_counts import RoutingCounts

BATCH_SIZES = (1, 8, 32, 256)


def make_profile(
    num_layers: int = 6,
    num_experts: int = 8,
    top_k: int = 2,
    num_tokens: int = 400,
    domains: tuple[str, ...] = ("a", "b"),
) -> RoutingProfile:
    """A profile of that shape; layers are the odd ones, as in a model with dense layers in between."""
    routes_TLK = SyntheticRouting(num_layers, num_experts, top_k, num_tokens).routes()
    rng = np.random.default_rng(0)
    statistics = count_routes(routes_TLK, num_experts)
    layer_ids = tuple(range(1, 2 * num_layers, 2))
    parts = np.array_split(routes_TLK, len(domains))
    half = num_tokens // 2
    mixed_BL = expected_active(statistics.popularity, num_tokens, BATCH_SIZES)
    return RoutingProfile(
        source=ProfiledSource("t.safetensors", "org/model", None, layer_ids, num_experts, top_k, num_tokens, 40),
        popularity=statistics.popularity,
        popularity_by_phase={
            "prefill": count_routes(routes_TLK[:half], num_experts).popularity,
            "decode": count_routes(routes_TLK[half:], num_experts).popularity,
        },
        popularity_by_domain={
            name: count_routes(part, num_experts).popularity for name, part in zip(domains, parts, strict=True)
        },
        tokens_by_phase={"prefill": half, "decode": num_tokens - half},
        tokens_by_domain={name: len(part) for name, part in zip(domains, parts, strict=True)},
        statistics=statistics,
        information=Information(*(rng.random(num_layers - 1) * most for most in (0.5, 0.01, 1.5, 0.02))),
        active=ActiveExperts(BATCH_SIZES, mixed_BL, mixed_BL * 0.9, mixed_BL.mean(axis=1) * 1.1, "decode"),
        convergence=Convergence(np.array([125, 500, 2000, 8000]), np.array([0.5, 0.3, 0.12, 0.1]), 0.1, 2000),
        domain_drift=make_drift(domains, rng),
        time_drift=make_drift(tuple("1234"), rng),
        potentials=tuple(LocalityPotential(gpus, 0.56, 1 / gpus, 1.9) for gpus in (2, 4)),
        predictors=(
            make_score("path-1", layer_ids[1:], rng, paper="28–32% at l = 1"),
            replace(make_score("gate", layer_ids[1:], rng), batch_accuracy=None, replan_rate=None),
        ),
    )


def make_drift(names: tuple[str, ...], rng: np.random.Generator) -> Drift:
    """Random distances, symmetric, nothing between a group and itself."""
    half = np.triu(rng.random((len(names), len(names))) * 0.5, 1)
    to_all = rng.random(len(names)) * 0.3
    return Drift(names, np.full(len(names), 100), half + half.T, to_all, to_all / 2)


def make_score(
    name: str, layer_ids: tuple[int, ...], rng: np.random.Generator, paper: str | None = None
) -> PredictorScore:
    """Random hit rates."""
    rates = (0.3 + 0.5 * rng.random(len(layer_ids)) for _ in range(4))
    return PredictorScore(name, f"what {name} sees", layer_ids, *rates, paper)


def make_counts_profile(counts_LE: np.ndarray) -> RoutingProfile:
    """What a file of counts alone gives."""
    return profile_counts(RoutingCounts(counts_LE, "org/model", tuple(range(len(counts_LE)))), "counts.safetensors")
