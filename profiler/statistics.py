"""Statistics of a routing trace: how popular experts are, and which are chosen together or one after the other.

Shape suffixes: L layers, E experts, T tokens, K choices per token, N groups of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from profiler.count_kernel import count_layer_pairs
from profiler.counting import GroupedCounts, PopularityCounts, over_layers
from profiler.errors import TraceError
from profiler.measures import mutual_information, popularity_skew
from profiler.trace_format import RoutingTrace
from profiler.trace_header import FORMAT_VERSION, STATISTICS_FORMAT, write_tensors

__all__ = [
    "UNNAMED_DOMAIN",
    "RoutingStatistics",
    "collect_by_domain",
    "collect_groups",
    "collect_statistics",
    "count_pairs",
    "domain_of_tokens",
    "mutual_information",
    "popularity_skew",
    "save_statistics",
    "shuffled_affinity",
]

UNNAMED_DOMAIN = "(unnamed)"
#: The shuffled control takes a sample of at most so many tokens: fewer make chance look larger, never smaller.
MOST_SHUFFLED_TOKENS = 1 << 20
MOST_SHUFFLED_BYTES = 1 << 29


@dataclass(frozen=True)
class RoutingStatistics:
    """Counts over the tokens of a trace, all int64.

    Attributes:
        num_tokens: tokens counted.
        popularity: ``[L, E]``, tokens that chose the expert.
        top1_popularity: ``[L, E]``, tokens whose first choice it was.
        affinity: ``[L-1, E, E]``, entry ``[l, a, b]``: tokens with a among the choices at layer l and b at layer l+1.
        top1_affinity: ``[L-1, E, E]``, the same with first choices alone.
        coactivation: ``[L, E, E]``, tokens that chose both experts; the diagonal equals popularity.
    """

    num_tokens: int
    popularity: np.ndarray
    top1_popularity: np.ndarray
    affinity: np.ndarray
    top1_affinity: np.ndarray
    coactivation: np.ndarray

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        """Counts over the tokens of both."""
        return RoutingStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def collect_statistics(trace: RoutingTrace, mask: np.ndarray | None = None) -> RoutingStatistics:
    """Count in one pass over a trace, in bounded memory.

    Args:
        trace: an open trace.
        mask: bool ``[T]``, the tokens to count (default: all).

    Returns:
        The counts.

    Raises:
        TraceError: the mask does not fit the trace, or selects no token.
    """
    _check_mask(trace, mask)
    group_T = np.zeros(trace.num_tokens, np.int32) if mask is None else np.where(mask, 0, -1).astype(np.int32)
    return collect_groups(trace, group_T, 1)[0]


def collect_by_domain(trace: RoutingTrace) -> dict[str, RoutingStatistics]:
    """Statistics of every domain's tokens alone, in one pass over the trace.

    Args:
        trace: an open trace.

    Returns:
        Statistics by the domain's name, in the order in which domains first appear; domains without tokens are
        left out.

    Raises:
        TraceError: the trace names no domains, or so many that their tables would not fit the memory.
    """
    names, domain_T = domain_of_tokens(trace)
    return dict(zip(names, collect_groups(trace, domain_T, len(names)), strict=True))


def domain_of_tokens(trace: RoutingTrace) -> tuple[list[str], np.ndarray]:
    """Every token's domain.

    Args:
        trace: an open trace.

    Returns:
        Names of the domains that have tokens, each once, in the order in which the trace lists them, and the index of
        each token's, int32 ``[T]``.

    Raises:
        TraceError: the trace names no domains.
    """
    if trace.domains is None:
        raise TraceError(f"{trace.path}: names no domains; record it from prompts with a domain each")
    named = [name or UNNAMED_DOMAIN for name in trace.domains]
    index_of_name = {name: index for index, name in enumerate(dict.fromkeys(named))}
    domain_of_sequence = np.array([index_of_name[name] for name in named], np.int32)
    domain_T = domain_of_sequence[trace.sequence()]
    seen, domain_T = np.unique(domain_T, return_inverse=True)
    names = list(index_of_name)
    return [names[index] for index in seen], domain_T.astype(np.int32)


def collect_groups(
    trace: RoutingTrace,
    group_T: np.ndarray,
    num_groups: int,
    also: Sequence[tuple[np.ndarray, PopularityCounts]] = (),
) -> list[RoutingStatistics]:
    """Statistics of every group's tokens alone, in one pass over the trace.

    Args:
        trace: an open trace.
        group_T: int32 ``[T]``, below N; negative: the token is not counted.
        num_groups: N.
        also: further groups ``[T]`` of the same tokens, and the tables that count their popularity in the same pass.

    Returns:
        N statistics.

    Raises:
        TraceError: the tables of so many groups would not fit the memory.
    """
    counts = GroupedCounts(trace, num_groups)
    for start, experts_TLK in trace.expert_chunks():
        chunk = slice(start, start + len(experts_TLK))
        counts.add(experts_TLK, group_T[chunk])
        for other_T, popularity in also:
            popularity.add(experts_TLK, other_T[chunk])
    return [
        RoutingStatistics(
            num_tokens=int((group_T == group).sum()),
            popularity=counts.popularity_NLE[group],
            top1_popularity=counts.top1_NLE[group],
            affinity=counts.affinity_NLEE[group],
            top1_affinity=counts.top1_affinity_NLEE[group],
            coactivation=counts.coactivation(group),
        )
        for group in range(num_groups)
    ]


def count_pairs(first_TK: np.ndarray, second_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """Count how often each pair of experts stands in the same row, over all K x K combinations.

    Args:
        first_TK: intp ``[T, K]``.
        second_TK: intp ``[T, K']``.
        num_experts: E.

    Returns:
        int64 ``[E, E]``.
    """
    pairs = first_TK[:, :, None] * num_experts + second_TK[:, None, :]
    return np.bincount(pairs.ravel(), minlength=num_experts * num_experts).reshape(num_experts, num_experts)


def shuffled_affinity(
    trace: RoutingTrace, mask: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Affinity after the tokens of every next layer are shuffled: the control that shows what chance alone gives.

    Args:
        trace: an open trace.
        mask: bool ``[T]``, the tokens to count (default: all). Of more than ``MOST_SHUFFLED_TOKENS`` a sample is taken.
        seed: of sample and shuffle.

    Returns:
        All pairs and first choices, int64 ``[L-1, E, E]`` each, with the popularities of the true affinity.

    Raises:
        TraceError: the mask does not fit the trace, or selects no token.
    """
    _check_mask(trace, mask)
    generator = np.random.default_rng(seed)
    tokens = np.arange(trace.num_tokens) if mask is None else np.flatnonzero(mask)
    row_bytes = trace.num_layers * trace.top_k * trace.experts(0, 1).itemsize
    most = min(MOST_SHUFFLED_TOKENS, MOST_SHUFFLED_BYTES // row_bytes)
    if len(tokens) > most:
        tokens = np.sort(generator.choice(tokens, most, replace=False))
    experts_TLK = trace.gather_experts(tokens)
    shape = (1, trace.num_layers - 1, trace.num_experts, trace.num_experts)
    affinity_NLEE, top1_affinity_NLEE = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    group_T = np.zeros(len(tokens), np.int32)

    def count(first: int, last: int) -> None:
        for layer in range(first, last):
            partner_T = np.random.default_rng([seed, layer]).permutation(len(tokens))
            pair_T2K = np.stack([experts_TLK[:, layer], experts_TLK[partner_T, layer + 1]], axis=1)
            tables = (affinity_NLEE[:, layer : layer + 1], top1_affinity_NLEE[:, layer : layer + 1])
            count_layer_pairs(pair_T2K, group_T, 0, 1, *tables)

    over_layers(trace.num_layers - 1, count)
    return affinity_NLEE[0], top1_affinity_NLEE[0]


def save_statistics(
    trace: RoutingTrace, path: Path, overall: RoutingStatistics, by_domain: dict[str, RoutingStatistics]
) -> None:
    """Write counts as safetensors: tensors named after the fields, and ``domains.<n>.<field>`` for the n-th domain.

    Args:
        trace: what they were counted on; its model, layers and the domains' names become metadata.
        path: the output.
        overall: over all tokens.
        by_domain: over each domain's, may be empty.

    Raises:
        TraceError: the output cannot be written.
    """
    named = {"": overall} | {f"domains.{n}.": statistics for n, statistics in enumerate(by_domain.values())}
    tensors = {
        prefix + field.name: np.asarray(getattr(statistics, field.name), "<i8")
        for prefix, statistics in named.items()
        for field in fields(statistics)
    }
    metadata = {
        "format": STATISTICS_FORMAT,
        "version": FORMAT_VERSION,
        "model": trace.model,
        "num_experts": str(trace.num_experts),
        "layer_ids": json.dumps(trace.layer_ids),
        "domains": json.dumps(list(by_domain)),
    }
    write_tensors(path, tensors, metadata)


def _check_mask(trace: RoutingTrace, mask: np.ndarray | None) -> None:
    if mask is None:
        return
    if mask.shape != (trace.num_tokens,) or mask.dtype != bool:
        raise TraceError(
            f"{trace.path}: a mask of {mask.dtype} {mask.shape} was given, expected bool ({trace.num_tokens},)"
        )
    if not mask.any():
        raise TraceError(f"{trace.path}: no token is selected; choose another split or domain, or record more prompts")
