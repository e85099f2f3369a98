"""What is in a trace or a file of counts, in one short table; and which traces were written, in another.

Shape suffixes: L layers, E experts, T tokens, K choices per token, S sequences, D domains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from profiler.counting import PopularityCounts
from profiler.measures import popularity_skew
from profiler.routing_counts import RoutingCounts
from profiler.sequence_runs import sequence_runs
from profiler.statistics import domain_of_tokens
from profiler.trace_format import OPTIONAL_TENSORS, RoutingTrace

MOST_DOMAINS = 6  # that are listed by name
FINGERPRINT_DIGITS = 16


def summary_table(trace: RoutingTrace) -> Table:
    """What is in an open trace, in a few lines."""
    popularity_LE = _count_popularity(trace)
    skew_L = popularity_skew(popularity_LE)
    decoded = int(trace.decode().sum(dtype=np.int64))
    ids_S, lengths_S = sequence_runs(trace.sequence())
    odd = int((ids_S % 2).sum())
    kept = [name.replace("_", " ") for name in OPTIONAL_TENSORS if name in trace.columns]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("trace", f"{trace.path} ({_size(trace.path)})"),
        ("model", trace.model),
        ("fingerprint", (trace.model_fingerprint or "none")[:FINGERPRINT_DIGITS]),
        ("source", trace.metadata.get("source") or "not told"),
        ("tokens", f"{trace.num_tokens:,} ({trace.num_tokens - decoded:,} prefill, {decoded:,} decode)"),
        ("sequences", f"{len(ids_S):,} ({len(ids_S) - odd:,} even, {odd:,} odd)"),
        (
            "tokens of a sequence",
            f"{lengths_S.min():,} to {lengths_S.max():,}, median {float(np.median(lengths_S)):,g}",
        ),
        ("domains", _domains(trace)),
        ("MoE layers", f"{trace.num_layers}: {_ranges(trace.layer_ids)}"),
        ("experts", f"top-{trace.top_k} of {trace.num_experts}"),
        ("busiest expert / mean", f"{skew_L.mean():.2f} (mean over layers), {skew_L.max():.2f} (worst layer)"),
        ("experts never chosen", str(int((popularity_LE == 0).sum()))),
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


def print_written(console: Console, paths: Iterable[Path], notes: Sequence[str] = ()) -> None:
    """Print which traces were written, how large they are, and what to know about them.

    Args:
        console: where to print.
        paths: traces that were just written.
        notes: lines to print below the table.
    """
    table = Table()
    for column in ("trace", "tokens", "sequences", "even", "odd"):
        table.add_column(column, justify="left" if column == "trace" else "right", overflow="fold")
    one_sided = []
    for path in paths:
        with RoutingTrace.open(path, validate=False) as trace:
            ids_S, _ = sequence_runs(trace.sequence())
            odd = int((ids_S % 2).sum())
            numbers = (trace.num_tokens, len(ids_S), len(ids_S) - odd, odd)
        table.add_row(escape(str(path)), *(f"{number:,}" for number in numbers))
        if odd in (0, len(ids_S)):
            one_sided.append(
                f"{path} has no {'even' if odd else 'odd'} sequences: plans are solved on even ones and judged on odd "
                "ones; split and sample number them anew with --renumber"
            )
    console.print(table)
    for note in [*notes, *one_sided]:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _count_popularity(trace: RoutingTrace) -> np.ndarray:
    """Tokens per layer and expert, int64 ``[L, E]``; no pairs, whose tables take longer."""
    counts = PopularityCounts(trace, 1)
    for _, experts_TLK in trace.expert_chunks():
        counts.add(experts_TLK, np.zeros(len(experts_TLK), np.int32))
    return counts.popularity_NLE[0]


def _domains(trace: RoutingTrace) -> str:
    """How many domains there are, and the tokens of the largest."""
    if trace.domains is None:
        return "none"
    names, domain_T = domain_of_tokens(trace)
    tokens_D = np.bincount(domain_T)
    largest = np.argsort(-tokens_D, kind="stable")[:MOST_DOMAINS]
    listed = [f"{names[domain]} {tokens_D[domain]:,}" for domain in largest]
    others = [f"{len(names) - len(listed)} more"] if len(names) > len(listed) else []
    return f"{len(names)}: {', '.join(listed + others)}"


def _size(path: Path) -> str:
    """A file's size, for people."""
    size = float(path.stat().st_size)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in short: ``1-3, 5``."""
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1] + 1]
    runs = [(numbers[a], numbers[b - 1]) for a, b in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
