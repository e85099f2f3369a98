"""Checks every value of a routing trace, in chunks, so that whatever reads it later can rely on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from profiler.errors import TraceError
from profiler.sequence_runs import sequence_starts

if TYPE_CHECKING:
    from profiler.trace_format import RoutingTrace, TraceChunk

TOKENS_PER_CHUNK = 16384


def validate_trace(trace: RoutingTrace) -> None:
    """Read a trace through once and check ranges, distinctness and order.

    Expert ids, those chosen one layer early too, are below ``num_experts`` and distinct within a token and layer;
    weights do not rise from one choice to the next; ``decode`` is 0 or 1; the tokens of a sequence stand together with
    rising positions; sequence ids are not negative and have a domain where the trace names domains.

    Args:
        trace: an open trace.

    Raises:
        TraceError: with the first offending value, its place, what was expected and the remedy.
    """
    for chunk in trace.chunks(TOKENS_PER_CHUNK):
        _check_experts(trace, chunk.start, chunk.experts, trace.layer_ids)
        if chunk.gate_ahead is not None and chunk.gate_ahead.size:
            _check_experts(trace, chunk.start, chunk.gate_ahead, trace.layer_ids[1:], " of gate_ahead")
        _check_weights(trace, chunk)
        _check_decode(trace, chunk)
    _check_order(trace)


def _fail(trace: RoutingTrace, problem: str) -> TraceError:
    return TraceError(f"{trace.path}: {problem}; record it again")


def _check_experts(
    trace: RoutingTrace, start: int, experts: np.ndarray, layer_ids: Sequence[int], where: str = ""
) -> None:
    if experts.max() >= trace.num_experts:
        token, layer, choice = np.argwhere(experts >= trace.num_experts)[0]
        raise _fail(
            trace,
            f"expert id {experts[token, layer, choice]}{where} in layer {layer_ids[layer]} at token {start + token}, "
            f"expected < {trace.num_experts}",
        )
    by_choice = np.ascontiguousarray(np.moveaxis(experts, -1, 0))  # comparing whole choices is 20 times faster
    for choice in range(trace.top_k - 1):
        repeated = by_choice[choice + 1 :] == by_choice[choice]
        if repeated.any():
            _, token, layer = np.argwhere(repeated)[0]
            raise _fail(
                trace,
                f"expert id {by_choice[choice, token, layer]}{where} stands twice in layer {layer_ids[layer]} at token "
                f"{start + token}, expected {trace.top_k} distinct experts",
            )


def _check_weights(trace: RoutingTrace, chunk: TraceChunk) -> None:
    if chunk.weights is None:
        return
    by_choice = np.moveaxis(chunk.weights, -1, 0).astype(np.float32, order="C")
    falling = by_choice[1:] <= by_choice[:-1]
    # Where weights fall and the first and last are finite, all are.
    sound = falling.all(axis=0) & np.isfinite(by_choice[0]) & np.isfinite(by_choice[-1])
    if not sound.all():
        token, layer = np.argwhere(~sound)[0]
        raise _fail(
            trace,
            f"weights {by_choice[:, token, layer].tolist()} in layer {trace.layer_ids[layer]} at token "
            f"{chunk.start + token}, expected finite numbers, falling, for experts sorted by falling weight",
        )


def _check_decode(trace: RoutingTrace, chunk: TraceChunk) -> None:
    wrong = np.flatnonzero(chunk.decode > 1)
    if len(wrong):
        token = wrong[0]
        raise _fail(trace, f"decode is {chunk.decode[token]} at token {chunk.start + token}, expected 0 or 1")


def _check_order(trace: RoutingTrace) -> None:
    """Checks on the one-dimensional columns, 8 bytes per token: small enough to be taken whole."""
    sequence, position = trace.sequence(), trace.position()
    starts = sequence_starts(sequence)
    ids = sequence[starts]
    if ids.min() < 0 or position.min() < 0:
        token = np.flatnonzero((sequence < 0) | (position < 0))[0]
        raise _fail(trace, f"sequence {sequence[token]}, position {position[token]} at token {token}, expected >= 0")
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(again):
        token = starts[order[again + 1].min()]
        raise _fail(trace, f"sequence {sequence[token]} starts again at token {token}, expected its tokens together")
    falls = np.flatnonzero((sequence[1:] == sequence[:-1]) & (position[1:] <= position[:-1]))
    if len(falls):
        token = falls[0] + 1
        raise _fail(
            trace,
            f"position {position[token]} at token {token} follows {position[token - 1]} in sequence {sequence[token]}, "
            "expected rising positions",
        )
    if trace.domains is not None and ids.max() >= len(trace.domains):
        raise _fail(trace, f"sequence {ids.max()} has no domain, expected at least {ids.max() + 1} names in domains")
