"""The table of predictors that ``stats --predictability`` prints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.markup import escape
from rich.table import Table

from profiler.profile import PredictorScore


def predictability_table(scores: Sequence[PredictorScore]) -> Table:
    """One row per predictor: means over the layers that all of them predict, and what the paper reports.

    Args:
        scores: of one trace; at least one.
    """
    table = Table(title="how well a layer's experts are known before its router runs", caption=_caption(scores))
    table.add_column("predictor", no_wrap=True)
    for column in ("experts", "first", "unseen", "popular", "re-plans"):
        table.add_column(column, justify="right")
    table.add_column("paper")
    for score, kept in compared(scores):
        rates = (score.hit_rate, score.top1_hit_rate, score.backed_off, score.batch_accuracy, score.replan_rate)
        cells = ["-" if rate is None else f"{rate[kept].mean():.1%}" for rate in rates]
        table.add_row(score.predictor, *cells, escape(score.paper or ""))
    return table


def shared_layers(scores: Sequence[PredictorScore]) -> list[int]:
    """Decoder layers that all predictors were judged on: means over these can be compared."""
    return sorted(set.intersection(*(set(score.layer_ids) for score in scores)))


def compared(scores: Sequence[PredictorScore]) -> list[tuple[PredictorScore, np.ndarray]]:
    """Every score with which of its layers are shared by all, bool ``[M]``."""
    shared = shared_layers(scores) if scores else []
    return [(score, np.isin(score.layer_ids, shared)) for score in scores]


def _caption(scores: Sequence[PredictorScore]) -> str:
    first = scores[0]
    caption = (
        f"mean of {len(shared_layers(scores))} layers; learned from {first.learned_tokens:,} tokens of even sequences, "
        f"judged on {first.judged_tokens:,} of odd ones. experts, first: share of a token's experts, of first choices, "
        "that were predicted; unseen: tokens whose whole context was new"
    )
    if first.batch_tokens is None:
        return caption
    return f"{caption}; popular, re-plans: the 2K most popular experts of batches of {first.batch_tokens} tokens"
