"""Statistics of a routing trace: how popular experts are, and which are chosen together or one after the other.

Shape suffixes: L layers, E experts, T tokens, K choices per token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.trace_format import RoutingTrace
from profiler.trace_header import FORMAT_VERSION, STATISTICS_FORMAT, write_tensors

# Keeps the table of one chunk's K x K pairs in the processor's caches.
TOKENS_PER_CHUNK = 8192
UNNAMED_DOMAIN = "(unnamed)"


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
    num_layers, num_experts = trace.num_layers, trace.num_experts
    popularity_LE = np.zeros((num_layers, num_experts), np.int64)
    top1_popularity_LE = np.zeros_like(popularity_LE)
    affinity_LEE = np.zeros((num_layers - 1, num_experts, num_experts), np.int64)
    top1_affinity_LEE = np.zeros_like(affinity_LEE)
    coactivation_LEE = np.zeros((num_layers, num_experts, num_experts), np.int64)
    num_tokens = 0
    for start in range(0, trace.num_tokens, TOKENS_PER_CHUNK):
        chosen = slice(None) if mask is None else mask[start : start + TOKENS_PER_CHUNK]
        experts_TLK = trace.experts(start, start + TOKENS_PER_CHUNK)[chosen]
        num_tokens += len(experts_TLK)
        if not len(experts_TLK):
            continue
        experts_LTK = np.ascontiguousarray(experts_TLK.transpose(1, 0, 2), np.intp)
        for layer, here_TK in enumerate(experts_LTK):
            popularity_LE[layer] += np.bincount(here_TK.ravel(), minlength=num_experts)
            top1_popularity_LE[layer] += np.bincount(here_TK[:, 0], minlength=num_experts)
            coactivation_LEE[layer] += count_pairs(here_TK, here_TK, num_experts)
            if layer + 1 < num_layers:
                next_TK = experts_LTK[layer + 1]
                affinity_LEE[layer] += count_pairs(here_TK, next_TK, num_experts)
                top1_affinity_LEE[layer] += count_pairs(here_TK[:, :1], next_TK[:, :1], num_experts)
    return RoutingStatistics(
        num_tokens, popularity_LE, top1_popularity_LE, affinity_LEE, top1_affinity_LEE, coactivation_LEE
    )


def collect_by_domain(trace: RoutingTrace) -> dict[str, RoutingStatistics]:
    """Statistics of every domain's tokens alone.

    Args:
        trace: an open trace.

    Returns:
        Statistics by the domain's name, in the order in which domains first appear; domains without tokens are
        left out.

    Raises:
        TraceError: the trace names no domains.
    """
    if trace.domains is None:
        raise TraceError(f"{trace.path}: names no domains; record it from prompts with a domain each")
    names = list(dict.fromkeys(trace.domains))
    index_of_name = {name: index for index, name in enumerate(names)}
    domain_of_sequence = np.array([index_of_name[name] for name in trace.domains])
    domain_of_token_T = domain_of_sequence[trace.sequence()]
    return {
        name or UNNAMED_DOMAIN: collect_statistics(trace, mask_T)
        for index, name in enumerate(names)
        if (mask_T := domain_of_token_T == index).any()
    }


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


def mutual_information(counts: np.ndarray) -> float:
    """Mutual information of the two experts of a pair, I(A; B).

    Args:
        counts: ``[E, E']``, how often each pair was seen; at least one.

    Returns:
        Bits.
    """
    joint = counts / counts.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def shuffled_affinity(
    trace: RoutingTrace, mask: np.ndarray | None = None, choices: int | None = None, seed: int = 0
) -> np.ndarray:
    """Affinity after the tokens of every next layer are shuffled: the control that shows what chance alone gives.

    Args:
        trace: an open trace.
        mask: bool ``[T]``, the tokens to count (default: all).
        choices: how many of a token's first choices count (default: all K; 1 for the control of top-1 affinity).
        seed: of the shuffle.

    Returns:
        int64 ``[L-1, E, E]``, with the popularities of the true affinity.

    Raises:
        TraceError: the mask does not fit the trace, or selects no token.
    """
    _check_mask(trace, mask)
    generator = np.random.default_rng(seed)
    tokens = np.arange(trace.num_tokens) if mask is None else np.flatnonzero(mask)
    shuffled_LEE = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts), np.int64)
    for layer in range(trace.num_layers - 1):
        # Two layers' columns at a time: a shuffle crosses the whole trace, and a column is T x K bytes or twice that.
        here_TK, next_TK = (trace.experts()[:, at, :choices] for at in (layer, layer + 1))
        partner = generator.permutation(tokens)
        for start in range(0, len(tokens), TOKENS_PER_CHUNK):
            chunk = slice(start, start + TOKENS_PER_CHUNK)
            first, second = here_TK[tokens[chunk]], next_TK[partner[chunk]]
            shuffled_LEE[layer] += count_pairs(first.astype(np.intp), second.astype(np.intp), trace.num_experts)
    return shuffled_LEE


def popularity_skew(popularity: np.ndarray) -> np.ndarray:
    """How much more than the mean expert the busiest one gets.

    Args:
        popularity: ``[L, E]``, counts.

    Returns:
        float64 ``[L]``, busiest expert / mean expert, at least 1.
    """
    return popularity.max(axis=1) / popularity.mean(axis=1)


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
