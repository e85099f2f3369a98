"""All K experts of the layer before vote by their affinity to the experts of this one.

Shape suffixes: T tokens, K choices, E experts.
"""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import Context, Estimate, Predictor, RouteSample, choice_weights
from profiler.predictors.kernels import sum_rows


class AffinityPredictor(Predictor):
    """Expects the mean of P(expert | expert before) over a token's K experts of the layer before.

    An expert that no token learned from had chosen votes by the layer's popularity.
    """

    name = "affinity"
    description = "all experts of the layer before, by affinity"

    def __init__(self, votes: np.ndarray, known: np.ndarray) -> None:
        """From each former expert's votes, float32 ``[E, E]``, and whether it was seen, bool ``[E]``; see ``learn``."""
        self.votes = votes
        self.known = known

    @classmethod
    def learn(cls, sample: RouteSample, layer: int) -> AffinityPredictor:
        """Count all pairs of choices in a layer and the one before it, which there must be."""
        num_experts = sample.num_experts
        before_TK, chosen_TK = sample.chosen(layer - 1).astype(np.int64), sample.chosen(layer)
        pairs_TKK = before_TK[:, :, None] * num_experts + chosen_TK[:, None, :]
        weights = np.broadcast_to(choice_weights(chosen_TK.shape[1]), pairs_TKK.shape)
        counts_EE = np.bincount(pairs_TKK.ravel(), weights.ravel(), minlength=num_experts**2)
        counts_EE = counts_EE.reshape(num_experts, num_experts)
        tokens_E = np.bincount(before_TK.ravel(), minlength=num_experts)[:, None]
        popularity_E = counts_EE.sum(axis=0) / tokens_E.sum()
        votes = np.where(tokens_E > 0, counts_EE / np.maximum(tokens_E, 1), popularity_E)
        return cls(votes.astype(np.float32), tokens_E[:, 0] > 0)

    def estimate(self, context: Context) -> Estimate:
        """The mean of the votes."""
        before_TK = context.experts[:, -1]
        scores = sum_rows(self.votes, before_TK) / before_TK.shape[1]
        return Estimate(scores.astype(np.float32), self.known[before_TK].all(axis=1))
