"""Experts told from the token's id alone: a table of what tokens with that id chose.

Source: ExpertFlow (routes predicted from token ids ahead of the forward pass; there by a trained transformer, which
sees the whole sequence. A table per id is the simplest such predictor, a floor for it).
"""

from __future__ import annotations

import numpy as np

from profiler.predictors.base import Context, Estimate, Predictor, RouteSample
from profiler.predictors.count_rows import CountRows, find_keys
from profiler.predictors.popularity import PopularityPredictor


class TokenIdPredictor(Predictor):
    """Expects what tokens of the same id chose; an id that was not learned backs off to the layer's popularity."""

    name = "token-id"
    description = "the token's id"

    def __init__(self, ids: np.ndarray, rows: CountRows, popularity: PopularityPredictor) -> None:
        """From known ids, ascending, and a row of counts for each; see ``learn``."""
        self.ids = ids
        self.rows = rows
        self.popularity = popularity

    @classmethod
    def learn(cls, sample: RouteSample, layer: int) -> TokenIdPredictor:
        """Count one layer's choices by token id, which the sample must have."""
        assert sample.token_ids is not None
        ids, group_T = np.unique(sample.token_ids, return_inverse=True)
        rows = CountRows.count(group_T, sample.chosen(layer), len(ids), sample.num_experts)
        return cls(ids, rows, PopularityPredictor.learn(sample, layer))

    def estimate(self, context: Context) -> Estimate:
        """The row of each token's id; the context must have token ids."""
        assert context.token_ids is not None
        rows_T = find_keys(self.ids, context.token_ids)
        scores_TE = self.popularity.estimate(context).scores
        self.rows.spread(scores_TE, rows_T)
        return Estimate(scores_TE, rows_T >= 0)
