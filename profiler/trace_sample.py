"""Draws sequences or tokens of a trace at random.

All draws of whole sequences go through one random order of them: with the same seed, a larger sample holds the
smaller one.

Shape suffixes: T tokens, S sequences.
"""

from __future__ import annotations

import numpy as np

from profiler.errors import TraceError
from profiler.sequence_runs import sequence_runs
from profiler.statistics import domain_of_tokens
from profiler.trace_format import RoutingTrace
from profiler.trace_split import generator_of


def draw_sequences(trace: RoutingTrace, num_sequences: int, seed: int = 0) -> np.ndarray:
    """Draw whole sequences.

    Args:
        trace: an open trace.
        num_sequences: how many.
        seed: of the draw.

    Returns:
        bool ``[T]``, the tokens of the drawn sequences.

    Raises:
        InputError: the seed is negative.
        TraceError: the trace has fewer sequences, or less than one is wanted.
    """
    lengths_S = sequence_runs(trace.sequence())[1]
    _require_within(trace, num_sequences, len(lengths_S), "sequences")
    return _tokens_of(_random_order(lengths_S, seed)[:num_sequences], lengths_S)


def draw_tokens(trace: RoutingTrace, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Draw whole sequences until they have a number of tokens: at least as many, by less than the last sequence.

    Args:
        trace: an open trace.
        num_tokens: how many.
        seed: of the draw.

    Returns:
        bool ``[T]``, the tokens of the drawn sequences.

    Raises:
        InputError: the seed is negative.
        TraceError: the trace has fewer tokens, or less than one is wanted.
    """
    _require_within(trace, num_tokens, trace.num_tokens, "tokens")
    lengths_S = sequence_runs(trace.sequence())[1]
    order = _random_order(lengths_S, seed)
    needed = np.searchsorted(np.cumsum(lengths_S[order]), num_tokens) + 1
    return _tokens_of(order[:needed], lengths_S)


def draw_single_tokens(trace: RoutingTrace, num_tokens: int, seed: int = 0) -> np.ndarray:
    """Draw exactly so many tokens, each for itself, wherever they stand; positions then have gaps.

    Args:
        trace: an open trace.
        num_tokens: how many.
        seed: of the draw.

    Returns:
        bool ``[T]``, the drawn tokens.

    Raises:
        InputError: the seed is negative.
        TraceError: the trace has fewer tokens, or less than one is wanted.
    """
    _require_within(trace, num_tokens, trace.num_tokens, "tokens")
    keep_T = np.zeros(trace.num_tokens, bool)
    keep_T[generator_of(seed).choice(trace.num_tokens, num_tokens, replace=False, shuffle=False)] = True
    return keep_T


def draw_per_domain(trace: RoutingTrace, num_sequences: int, seed: int = 0) -> np.ndarray:
    """Draw the same number of whole sequences of every domain.

    Args:
        trace: an open trace.
        num_sequences: how many of each domain that has any.
        seed: of the draw.

    Returns:
        bool ``[T]``, the tokens of the drawn sequences.

    Raises:
        InputError: the seed is negative.
        TraceError: the trace names no domains, one has fewer sequences, or less than one is wanted.
    """
    lengths_S = sequence_runs(trace.sequence())[1]
    names, domain_T = domain_of_tokens(trace)
    domain_S = domain_T[np.cumsum(lengths_S) - 1]
    available = np.bincount(domain_S)
    rarest = int(available.argmin())
    _require_within(trace, num_sequences, int(available[rarest]), f"sequences of domain {names[rarest]!r}")
    order = _random_order(lengths_S, seed)
    by_domain = order[np.argsort(domain_S[order], kind="stable")]
    firsts = np.cumsum(available) - available
    drawn = by_domain[(firsts[:, None] + np.arange(num_sequences)).ravel()]
    return _tokens_of(drawn, lengths_S)


def _require_within(trace: RoutingTrace, wanted: int, available: int, what: str) -> None:
    if not 1 <= wanted <= available:
        raise TraceError(
            f"{trace.path}: has {available} {what}, {wanted} are wanted; name a number from 1 to {available}"
        )


def _random_order(lengths_S: np.ndarray, seed: int) -> np.ndarray:
    return generator_of(seed).permutation(len(lengths_S))


def _tokens_of(drawn: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    keep_S = np.zeros(len(lengths_S), bool)
    keep_S[drawn] = True
    return np.repeat(keep_S, lengths_S)
