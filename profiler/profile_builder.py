"""Builds a `RoutingProfile`: one pass over a trace counts everything, the rest follows from the counts.

Shape suffixes: T tokens, L layers, E experts, D domains, B batch sizes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from profiler.convergence import measure_convergence
from profiler.counting import PopularityCounts
from profiler.drift import Grouping, group_sequences, measure_drift, sequence_of_tokens, time_windows
from profiler.measures import expected_active, mutual_information
from profiler.potential import locality_potentials
from profiler.predictors.scoring import score_predictors
from profiler.profile import ActiveExperts, Information, ProfiledSource, RoutingProfile
from profiler.routing_counts import RoutingCounts
from profiler.routing_source import open_routing
from profiler.sequence_runs import sequence_starts
from profiler.statistics import RoutingStatistics, collect_groups, domain_of_tokens, shuffled_affinity
from profiler.trace_format import RoutingTrace

PHASES = ("prefill", "decode")
BATCH_SIZES = tuple(2**n for n in range(11))


def profile_file(path: Path, predictability: bool) -> RoutingProfile:
    """Profile a trace or a file of counts.

    Args:
        path: the file.
        predictability: whether to learn predictors and judge them, which needs even and odd sequences.

    Raises:
        TraceError: it cannot be read, or names so many domains that their tables would not fit the memory.
    """
    source = open_routing(path)
    if isinstance(source, RoutingCounts):
        return profile_counts(source, path.name)
    with source:
        profile = profile_trace(source)
        if not predictability or len(np.unique(source.sequence() % 2)) < 2:
            return profile
        return replace(profile, predictors=score_predictors(source))


def profile_counts(counts: RoutingCounts, name: str) -> RoutingProfile:
    """What a file of counts tells: popularity.

    Args:
        counts: the counts.
        name: the file's name.
    """
    return RoutingProfile(
        source=ProfiledSource(
            path=name,
            model=counts.model,
            source=counts.source,
            layer_ids=counts.layer_ids,
            num_experts=counts.num_experts,
            top_k=None,
            num_tokens=None,
            num_sequences=None,
        ),
        popularity=counts.counts,
        popularity_by_phase={},
        popularity_by_domain={},
        tokens_by_phase={},
        tokens_by_domain={},
        statistics=None,
        information=None,
        active=None,
        convergence=None,
        domain_drift=None,
        time_drift=None,
        potentials=(),
        predictors=(),
    )


def profile_trace(trace: RoutingTrace, seed: int = 0) -> RoutingProfile:
    """Everything but predictability: one pass over the trace, and a look at samples of it.

    Args:
        trace: an open trace.
        seed: of samples and controls.

    Raises:
        TraceError: it names so many domains that their tables would not fit the memory.
    """
    sequence_T = sequence_of_tokens(trace)
    names, domain_T = ([], np.zeros(trace.num_tokens, np.int32)) if trace.domains is None else domain_of_tokens(trace)
    num_domains = max(1, len(names))
    by_phase = PopularityCounts(trace, num_domains * len(PHASES))  # of every domain
    also = [(domain_T * len(PHASES) + trace.decode().astype(np.int32), by_phase)]
    windows = time_windows(sequence_T, seed)
    first_of_sequence = sequence_starts(sequence_T)
    domains = group_sequences(names, domain_T[first_of_sequence], sequence_T, seed) if len(names) > 1 else None
    drifting = [(grouping, _drift_tables(trace, grouping)) for grouping in (domains, windows)]
    also += [table for _, tables in drifting for table in tables]
    # Placements are solved on even sequences and judged on odd ones.
    halves = collect_groups(trace, trace.sequence() % 2, 2, also)
    statistics = halves[0] + halves[1]
    popularity_DPLE = by_phase.popularity_NLE.reshape(num_domains, len(PHASES), trace.num_layers, trace.num_experts)
    tokens_DP = np.bincount(also[0][0], minlength=num_domains * len(PHASES)).reshape(num_domains, len(PHASES))
    phases = [phase for phase in range(len(PHASES)) if tokens_DP[:, phase].any()]
    drifts = [
        None if grouping is None else measure_drift(grouping, *(counts.popularity_NLE for _, counts in tables))
        for grouping, tables in drifting
    ]
    linked = trace.num_layers > 1
    return RoutingProfile(
        source=_describe(trace),
        popularity=statistics.popularity,
        popularity_by_phase={PHASES[phase]: popularity_DPLE[:, phase].sum(axis=0) for phase in phases},
        popularity_by_domain={name: popularity_DPLE[n].sum(axis=0) for n, name in enumerate(names)},
        tokens_by_phase={PHASES[phase]: int(tokens_DP[:, phase].sum()) for phase in phases},
        tokens_by_domain={name: int(tokens_DP[n].sum()) for n, name in enumerate(names)},
        statistics=statistics,
        information=_information(trace, statistics, seed) if linked else None,
        active=_active_experts(popularity_DPLE, tokens_DP, phases[-1], trace.top_k),
        convergence=measure_convergence(trace, sequence_T, statistics.affinity, seed) if linked else None,
        domain_drift=drifts[0],
        time_drift=drifts[1],
        potentials=locality_potentials(halves[0].affinity, halves[1].affinity, halves[1].popularity, seed)
        if linked and halves[0].num_tokens and halves[1].num_tokens
        else (),
        predictors=(),
    )


def _describe(trace: RoutingTrace) -> ProfiledSource:
    return ProfiledSource(
        path=trace.path.name,
        model=trace.model,
        source=trace.metadata.get("source"),
        layer_ids=trace.layer_ids,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_tokens=trace.num_tokens,
        num_sequences=trace.num_sequences,
    )


def _drift_tables(trace: RoutingTrace, grouping: Grouping | None) -> list[tuple[np.ndarray, PopularityCounts]]:
    """Tables to count the groups, and the groups put together at random."""
    if grouping is None:
        return []
    return [
        (group_T, PopularityCounts(trace, len(grouping.names))) for group_T in (grouping.group_T, grouping.random_T)
    ]


def _information(trace: RoutingTrace, statistics: RoutingStatistics, seed: int) -> Information:
    shuffled, shuffled_top1 = shuffled_affinity(trace, seed=seed)
    tables = (statistics.affinity, shuffled, statistics.top1_affinity, shuffled_top1)
    return Information(*(np.array([mutual_information(counts_EE) for counts_EE in table_LEE]) for table_LEE in tables))


def _active_experts(popularity_DPLE: np.ndarray, tokens_DP: np.ndarray, phase: int, top_k: int) -> ActiveExperts:
    popularity_DLE, tokens_D = popularity_DPLE[:, phase], tokens_DP[:, phase]
    num_experts = popularity_DLE.shape[-1]
    there = [domain for domain, tokens in enumerate(tokens_D) if tokens]
    by_domain_DBL = [expected_active(popularity_DLE[domain], tokens_D[domain], BATCH_SIZES) for domain in there]
    return ActiveExperts(
        batch_sizes=BATCH_SIZES,
        mixed=expected_active(popularity_DLE.sum(axis=0), tokens_D.sum(), BATCH_SIZES),
        same_domain=np.average(by_domain_DBL, axis=0, weights=tokens_D[there]) if len(there) > 1 else None,
        uniform=num_experts * (1 - (1 - top_k / num_experts) ** np.array(BATCH_SIZES, np.float64)),
        phase=PHASES[phase],
    )
