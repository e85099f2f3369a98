"""The baseline: a layer's most popular experts, whatever the token."""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import Context, Estimate, Predictor, RouteSample, choice_weights


class PopularityPredictor(Predictor):
    """Expects of every token what the tokens learned from chose on average."""

    name = "popularity"
    description = "the layer's most popular experts"

    def __init__(self, shares: np.ndarray) -> None:
        """From shares of tokens that chose each expert, float32 ``[E]``; see ``learn``."""
        self.shares = shares

    @classmethod
    def learn(cls, sample: RouteSample, layer: int) -> PopularityPredictor:
        """Count one layer's choices."""
        chosen_TK = sample.chosen(layer)
        weights = np.broadcast_to(choice_weights(chosen_TK.shape[1]), chosen_TK.shape)
        counts = np.bincount(chosen_TK.ravel(), weights.ravel(), minlength=sample.num_experts)
        return cls((counts / sample.num_tokens).astype(np.float32))

    def estimate(self, context: Context) -> Estimate:
        """The same for every token."""
        num_tokens = len(context.experts)
        return Estimate(np.tile(self.shares, (num_tokens, 1)), np.ones(num_tokens, bool))
