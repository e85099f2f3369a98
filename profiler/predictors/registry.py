"""Which predictors there are."""

from __future__ import annotations

from profiler.predictors.affinity import AffinityPredictor
from profiler.predictors.base import Predictor, RouteSample
from profiler.predictors.gate_ahead import GateAheadPredictor
from profiler.predictors.paths import PathPredictor, PathTree
from profiler.predictors.popularity import PopularityPredictor
from profiler.predictors.token_id import TokenIdPredictor

LONGEST_PATH = 6


def learn_predictors(sample: RouteSample, layer: int, longest_path: int = LONGEST_PATH) -> list[Predictor]:
    """Every predictor of one layer that can be had.

    Args:
        sample: what to learn from.
        layer: index of the layer among the MoE layers. The first has none before it: no affinity, paths or gate ahead.
        longest_path: paths of 1 to so many layers.

    Returns:
        Predictors in the order in which tables show them; those that need token ids or ``gate_ahead`` only where the
        sample has them.
    """
    predictors: list[Predictor] = [PopularityPredictor.learn(sample, layer)]
    if sample.token_ids is not None:
        predictors.append(TokenIdPredictor.learn(sample, layer))
    if layer:
        tree = PathTree.learn(sample, layer, longest_path)
        predictors += [PathPredictor(tree, length) for length in range(1, longest_path + 1)]
        predictors.append(AffinityPredictor.learn(sample, layer))
        if sample.gate_ahead is not None:
            predictors.append(GateAheadPredictor(sample.num_experts))
    return predictors
