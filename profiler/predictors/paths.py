"""Experts told from the path of first choices through the last layers.

Theirs (Lina): tokens that took the same path through the last l layers are taken together; what they chose in the
next layer gives P_path(expert), learned from tokens seen before; a batch's popularity is its sum over their paths.

Our reading, where the text at hand does not say more: a path is made of first choices alone, while all K choices of the
next layer are counted; a path that was never seen backs off to its longest part that was (the nearest layers), down to
the layer's popularity; in the first layers, where Lina plans nothing ahead, the path is as long as there are layers.

Source: Lina (USENIX ATC 2023, popularity estimation by sample path).

Shape suffixes: T tokens, H layers of history, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.predictors.base import Context, Estimate, Predictor, RouteSample
from profiler.predictors.count_rows import CountRows, find_keys
from profiler.predictors.popularity import PopularityPredictor

#: What Lina reports by length of the path.
PAPER = {1: "Lina: 28-32%", 3: "Lina: 60-64%, re-plans 23%", 6: "Lina: 66-71%"}


@dataclass(frozen=True)
class PathLevel:
    """The paths of one length that were seen, numbered in ascending order of their keys.

    Attributes:
        keys: int64, ascending: number of the path without its farthest layer · E + expert of that layer.
        rows: what tokens on each path chose.
    """

    keys: np.ndarray
    rows: CountRows


class PathTree:
    """All paths up to some length into one layer: only paths that were seen, never E to the power of the length.

    A level of T tokens learned from has at most T paths and T·K pairs: 14 bytes + 6 K bytes per token.
    """

    def __init__(self, levels: list[PathLevel], popularity: PopularityPredictor) -> None:
        """From levels by rising length; see ``learn``."""
        self.levels = levels
        self.popularity = popularity

    @classmethod
    def learn(cls, sample: RouteSample, layer: int, longest: int) -> PathTree:
        """Count one layer's choices by path; paths are cut where the model has fewer layers before it."""
        levels = []
        number_T = np.zeros(sample.num_tokens, np.int64)
        for length in range(1, min(longest, layer) + 1):
            keys_T = number_T * sample.num_experts + sample.experts[:, layer - length, 0]
            keys, number_T = np.unique(keys_T, return_inverse=True)
            rows = CountRows.count(number_T, sample.chosen(layer), len(keys), sample.num_experts)
            levels.append(PathLevel(keys, rows))
        return cls(levels, PopularityPredictor.learn(sample, layer))

    def estimate(self, context: Context, length: int) -> Estimate:
        """The longest part of each token's path that was seen, up to a length."""
        scores_TE = self.popularity.estimate(context).scores
        number_T = np.zeros(len(scores_TE), np.int64)
        for nearest, level in enumerate(self.levels[: min(length, context.experts.shape[1])], start=1):
            keys_T = number_T * scores_TE.shape[1] + context.experts[:, -nearest, 0]
            number_T = find_keys(level.keys, keys_T)  # after a part that was not seen keys are negative: not found
            level.rows.spread(scores_TE, number_T)
        return Estimate(scores_TE, number_T >= 0)


class PathPredictor(Predictor):
    """Expects what tokens on the same path through the last layers chose.

    Args:
        tree: the paths, shared by predictors of several lengths.
        length: how many layers a path has.
    """

    def __init__(self, tree: PathTree, length: int) -> None:
        self.tree = tree
        self.length = length
        self.name = f"path-{length}"
        self.description = f"first choices of the last {length} layers" if length > 1 else "first choice, layer before"
        self.paper = PAPER.get(length)

    def estimate(self, context: Context) -> Estimate:
        """By the longest part of the path that was seen."""
        return self.tree.estimate(context, self.length)
