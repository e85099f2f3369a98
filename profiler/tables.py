"""The short tables that the verbs print about a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from profiler.statistics import (
    RoutingStatistics,
    collect_statistics,
    mutual_information,
    popularity_skew,
    shuffled_affinity,
)
from profiler.trace_format import RoutingCounts, RoutingTrace


def summary_table(trace: RoutingTrace) -> Table:
    """What is in a trace, in a few lines."""
    popularity = collect_statistics(trace).popularity
    skew = popularity_skew(popularity)
    decoded = int(trace.decode().sum(dtype=np.int64))
    kept = [name for name, there in (("weights", trace.has_weights), ("token ids", trace.has_token_ids)) if there]
    table = Table(show_header=False)
    for name, value in (
        ("trace", str(trace.path)),
        ("model", trace.model),
        ("tokens", f"{trace.num_tokens:,} ({trace.num_tokens - decoded:,} prefill, {decoded:,} decode)"),
        ("sequences", f"{trace.num_sequences:,}"),
        ("domains", "none" if trace.domains is None else str(len(set(trace.domains)))),
        ("MoE layers", f"{trace.num_layers}: {_ranges(trace.layer_ids)}"),
        ("experts", f"top-{trace.top_k} of {trace.num_experts}"),
        ("busiest expert / mean", f"{skew.mean():.2f} (mean over layers), {skew.max():.2f} (worst layer)"),
        ("experts never chosen", str(int((popularity == 0).sum()))),
        ("also recorded", ", ".join(kept) or "nothing"),
    ):
        table.add_row(name, escape(value))
    return table


def counts_table(path: Path, counts: RoutingCounts) -> Table:
    """What is in a file of counts, in a few lines; layers without any count are left out of the ratios."""
    per_layer = counts.counts.sum(axis=1)
    skew = popularity_skew(counts.counts[per_layer > 0])
    busiest = (
        f"{skew.mean():.2f} (mean over layers), {skew.max():.2f} (worst layer)" if len(skew) else "nothing counted"
    )
    table = Table(show_header=False)
    for name, value in (
        ("counts", str(path)),
        ("model", counts.model),
        ("pairs counted", f"{per_layer.sum():,} ({per_layer.min():,} to {per_layer.max():,} per layer)"),
        ("MoE layers", f"{len(counts.layer_ids)}: {_ranges(counts.layer_ids)}"),
        ("experts", str(counts.num_experts)),
        ("busiest expert / mean", busiest),
        ("experts never chosen", str(int((counts.counts == 0).sum()))),
        ("source", counts.source or "not told"),
    ):
        table.add_row(name, escape(value))
    return table


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


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short: ``1-3, 5``."""
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    runs = [(numbers[a], numbers[b - 1]) for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
