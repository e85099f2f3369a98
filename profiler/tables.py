"""The short tables that ``stats`` prints."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from profiler.statistics import (
    RoutingStatistics,
    mutual_information,
    popularity_skew,
    shuffled_affinity,
)
from profiler.trace_format import RoutingTrace


def layer_table(trace: RoutingTrace, statistics: RoutingStatistics) -> Table:
    """Per layer: how uneven the experts are, and what a layer's choices tell about the next layer's."""
    table = Table(
        title="per layer", caption="bits: mutual information of the experts chosen here and in the next layer"
    )
    columns = ("layer", "busiest / mean", "never chosen", "entropy, bits", "bits", "chance", "top-1 bits", "chance")
    for column in columns:
        table.add_column(column, justify="right")
    shuffled, shuffled_top1 = shuffled_affinity(trace), shuffled_affinity(trace, choices=1)
    skew = popularity_skew(statistics.popularity)
    for layer, layer_id in enumerate(trace.layer_ids):
        share = statistics.popularity[layer] / statistics.popularity[layer].sum()
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        pairs = (statistics.affinity, shuffled, statistics.top1_affinity, shuffled_top1)
        last = layer + 1 == trace.num_layers
        information = [""] * 4 if last else [f"{mutual_information(counts[layer]):.4f}" for counts in pairs]
        never = int((statistics.popularity[layer] == 0).sum())
        table.add_row(str(layer_id), f"{skew[layer]:.2f}", str(never), f"{entropy:.2f}", *information)
    return table


def domain_table(statistics: RoutingStatistics, by_domain: dict[str, RoutingStatistics]) -> Table:
    """Per domain: how far its popularity is from the whole trace's."""
    table = Table(
        title="per domain", caption="moved: share of its choices that would have to change to match the trace"
    )
    for column in ("domain", "tokens", "busiest / mean", "moved"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    whole = _shares(statistics.popularity)
    for name, domain in by_domain.items():
        moved = np.abs(_shares(domain.popularity) - whole).sum(axis=1).mean() / 2
        skew = popularity_skew(domain.popularity).mean()
        table.add_row(escape(name), f"{domain.num_tokens:,}", f"{skew:.2f}", f"{moved:.1%}")
    return table


def _shares(popularity: np.ndarray) -> np.ndarray:
    return popularity / popularity.sum(axis=1, keepdims=True)
