"""The numbers of the page as tables: what the charts show, readable without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from profiler.measures import gini, popularity_skew
from profiler.predictors.table import compared
from profiler.profile import Drift, RoutingProfile

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        caption: what stands in the table, with units.
        columns: headings.
        rows: cells; the first ``words`` columns are words, the others numbers.
        words: how many columns from the left are words.
        trailing_words: whether the last column is words too.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    trailing_words: bool = False

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which stand left; numbers stand right."""
        return column < self.words or (self.trailing_words and column == len(self.columns) - 1)


def source_facts(profile: RoutingProfile) -> list[tuple[str, str]]:
    """What was profiled, as names and values."""
    source = profile.source
    layers, ids = len(source.layer_ids), source.layer_ids
    span = f"layer {ids[0]}" if layers == 1 else f"from layer {ids[0]} to {ids[-1]}"
    facts = [
        ("File", source.path),
        ("Tokens", _whole(source.num_tokens)),
        ("Phases", ", ".join(f"{name} {count:,}" for name, count in profile.tokens_by_phase.items())),
        ("Sequences", _whole(source.num_sequences)),
        ("Domains", f"{len(profile.tokens_by_domain):,}" if profile.tokens_by_domain else "none named"),
        ("MoE layers", f"{layers:,}, {span}"),
        ("Experts", f"{source.num_experts:,} per layer"),
        ("Top-k", "not recorded" if source.top_k is None else f"{source.top_k} per token and layer"),
        ("Source", source.source),
    ]
    return [(name, value) for name, value in facts if value]


def layer_table(profile: RoutingProfile) -> Table:
    """Skew and mutual information, layer by layer."""
    popularity, information = profile.popularity, profile.information
    skew, unevenness = popularity_skew(popularity), gini(popularity)
    columns = ["layer", "busiest expert", "busiest / mean", "Gini", "never chosen"]
    bits: tuple[np.ndarray, ...] = ()
    if information is not None:
        columns += ["bits to next", "shuffled", "top-1 bits", "shuffled"]
        bits = (information.pairs, information.pairs_shuffled, information.top1, information.top1_shuffled)
    rows = []
    for layer, layer_id in enumerate(profile.source.layer_ids):
        counted = popularity[layer].any()
        measures = [str(popularity[layer].argmax()), f"{skew[layer]:.2f}", f"{unevenness[layer]:.3f}"]
        known = [f"{values[layer]:.4f}" if layer < len(values) else NOTHING for values in bits]
        never = f"{int((popularity[layer] == 0).sum())}"
        rows.append((str(layer_id), *(measures if counted else [NOTHING] * 3), never, *known))
    return Table("Per layer: how uneven, and how much it tells about the next layer", tuple(columns), rows, words=0)


def potential_table(profile: RoutingProfile) -> Table:
    """How much of the routing placement by affinity keeps on one GPU."""
    rows = [(str(p.num_gpus), f"{p.contiguous:.1%}", f"{p.kept:.1%}", f"{p.max_load:.2f}") for p in profile.potentials]
    columns = ("GPUs", "kept, contiguous", "kept, by affinity", "busiest GPU / mean, by affinity")
    return Table("Pairs of adjacent layers that stay on one GPU", columns, rows, words=0)


def active_table(profile: RoutingProfile) -> Table | None:
    """Expected active experts by batch size."""
    active = profile.active
    if active is None:
        return None
    rows = []
    for at, batch in enumerate(active.batch_sizes):
        mixed_L = active.mixed[at]
        same = NOTHING if active.same_domain is None else f"{active.same_domain[at].mean():.2f}"
        cells = (f"{value:.2f}" for value in (mixed_L.mean(), mixed_L.min(), mixed_L.max()))
        rows.append((f"{batch:,}", *cells, same, f"{active.uniform[at]:.2f}"))
    columns = ("tokens", "mixed", "least layer", "most layer", "same domain", "uniform")
    return Table("Expected active experts per layer, by tokens in the batch", columns, rows, words=0)


def convergence_table(profile: RoutingProfile) -> Table | None:
    """Distance of the affinity from unseen tokens, by tokens counted."""
    convergence = profile.convergence
    if convergence is None:
        return None
    rows = [
        (f"{int(n):,}", f"{distance:.4f}") for n, distance in zip(convergence.tokens, convergence.distance, strict=True)
    ]
    return Table("Total variation from the affinity of all other tokens", ("tokens counted", "distance"), rows, words=0)


def drift_table(drift: Drift | None, kind: str) -> Table | None:
    """Each group's distance from the whole trace."""
    if drift is None:
        return None
    rows = [
        (name, f"{int(tokens):,}", f"{moved:.2%}", f"{control:.2%}")
        for name, tokens, moved, control in zip(
            drift.names, drift.tokens, drift.to_all, drift.to_all_control, strict=True
        )
    ]
    return Table(f"Drift of each {kind} from the whole", (kind, "tokens", "drift", "random control"), rows)


def predictor_table(profile: RoutingProfile) -> Table:
    """How well each predictor does, mean over the layers that all of them predict."""
    rows = [
        (
            score.predictor,
            score.description,
            _mean(score.hit_rate, kept),
            _span(score.hit_rate[kept]),
            _mean(score.top1_hit_rate, kept),
            _mean(score.batch_accuracy, kept),
            _mean(score.replan_rate, kept),
            score.paper or NOTHING,
        )
        for score, kept in compared(profile.predictors)
    ]
    columns = (
        "predictor",
        "predicts from",
        "hit rate",
        "least–most layer",
        "top-1 hit rate",
        "batch accuracy",
        "re-plan rate",
        "reported in the paper",
    )
    caption = "Mean over the layers that all predict, judged on sequences that were not learned from"
    return Table(caption, columns, rows, words=2, trailing_words=True)


def _mean(values_M: np.ndarray | None, kept_M: np.ndarray) -> str:
    known = [] if values_M is None else [value for value in values_M[kept_M] if np.isfinite(value)]
    return f"{np.mean(known):.1%}" if known else NOTHING


def _span(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.min():.0%}–{known.max():.0%}" if len(known) else NOTHING


def _whole(value: int | None) -> str:
    return "not recorded" if value is None else f"{value:,}"
