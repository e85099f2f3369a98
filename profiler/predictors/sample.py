"""Draws the routes that predictors learn from and are judged on: all there are, or a seeded sample of sequences.

Shape suffixes: T tokens, S sequences.
"""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import RouteSample
from profiler.trace_format import RoutingTrace


def draw_sample(
    trace: RoutingTrace, mask: np.ndarray, max_tokens: int, seed: int = 0, choices: int | None = None
) -> RouteSample:
    """Routes of some tokens, read into memory.

    Args:
        trace: an open trace.
        mask: bool ``[T]``, which tokens may be drawn; at least one.
        max_tokens: where the mask has more, whole sequences are drawn until there are so many, the last one cut.
        seed: of that draw.
        choices: keep a token's first so many choices alone (default: all K).
    """
    tokens = np.flatnonzero(mask)
    if len(tokens) > max_tokens:
        ids_S, sequence_T = np.unique(trace.sequence()[tokens], return_inverse=True)
        order_S = np.random.default_rng(seed).permutation(len(ids_S))
        tokens = np.sort(tokens[np.argsort(order_S[sequence_T], kind="stable")[:max_tokens]])
    return RouteSample(
        trace.gather_experts(tokens)[:, :, :choices],
        trace.num_experts,
        trace.token_ids()[tokens] if trace.has_token_ids else None,
        trace.gate_ahead()[tokens, :, :choices] if trace.has_gate_ahead else None,
    )
