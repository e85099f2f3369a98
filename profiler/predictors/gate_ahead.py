"""Experts that a layer's router chooses from the gate input of the layer before, as recorded in the trace.

Source: Fate (cross-layer gate: adjacent layers' gate inputs are alike, so that the next gate can be run early).
"""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import Context, Estimate, Predictor, choice_weights


class GateAheadPredictor(Predictor):
    """Expects the experts that were foretold, in their order; learns nothing.

    Args:
        num_experts: E.
    """

    name = "gate-ahead"
    description = "this layer's gate, fed the gate input of the layer before"
    paper = "Fate: about 97% of experts"

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def estimate(self, context: Context) -> Estimate:
        """1 for each expert foretold; the context must have ``gate_ahead``."""
        assert context.gate_ahead is not None
        num_tokens, top_k = context.gate_ahead.shape
        scores_TE = np.zeros((num_tokens, self.num_experts), np.float32)
        np.put_along_axis(scores_TE, context.gate_ahead.astype(np.intp), choice_weights(top_k)[None, :], axis=1)
        return Estimate(scores_TE, np.ones(num_tokens, bool))
