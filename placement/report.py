"""What the command line shows: tables of judged plans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from placement.bootstrap import Interval
from placement.cluster import Cluster
from placement.comparison import ComparedPlan
from placement.held_out import HeldOutSplit
from placement.metrics import Metrics
from placement.problem import Objective, Solution
from placement.settings import CompareSettings
from placement.uncertainty import Fastest, fastest

#: Step times from here on are printed in whole microseconds.
LONG_STEP_US = 10_000.0

LEGEND = (
    "load: busiest GPU / mean; active: busiest GPU's active experts / even share; "
    "µs: predicted time of a step's MoE layers; B: tokens per step"
)

INTERVALS = (
    "±: half a 95% interval; it covers the draw of steps (localities, GPUs per token: of sequences) from these tokens "
    "only, not other prompts"
)


def print_metrics(console: Console, rows: Mapping[str, Metrics], title: str) -> None:
    """Two tables, one row per plan: load and locality; active ratio and step time by tokens per step (B)."""
    sizes = list(next(iter(rows.values())).by_batch_size)
    print_lines(console, [title])
    placement = plan_table("load\nmean", "load\nmax", "pair\nlocality", "top-1\nlocality", "GPUs per\ntoken")
    steps = plan_table(*(f"active\nB={size}" for size in sizes), *(f"µs\nB={size}" for size in sizes))
    for name, metrics in rows.items():
        by_size = [metrics.by_batch_size[size] for size in sizes]
        last = by_size[-1]
        localities = [last.pair_locality, last.top1_transition_locality]
        figures = [f"{figure:.3f}" for figure in (metrics.load_mean, metrics.load_max, *localities)]
        placement.add_row(escape(name), *figures, f"{last.gpus_per_token:.2f}")
        steps.add_row(escape(name), *(f"{m.active_ratio:.3f}" for m in by_size), *(f"{m.step_us:.0f}" for m in by_size))
    console.print(placement)
    console.print(steps)
    print_lines(console, [LEGEND])


def plan_table(*columns: str) -> Table:
    """An empty table with one row per plan: its name, then figures, aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("plan")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def print_comparison(
    console: Console, cluster: Cluster, rows: Sequence[ComparedPlan], settings: CompareSettings, slots_per_layer: int
) -> None:
    """Two tables for each kind of held-out tokens, one row per plan, and which plan is fastest.

    Half-widths of the 95% intervals are shown where the console is wide enough for them.

    Args:
        console: to print on.
        cluster: that plans were judged on.
        rows: of ``compare_strategies``.
        settings: they were made with.
        slots_per_layer: the budget, over all GPUs.
    """
    for _, block in groupby(rows, key=lambda row: row.split.held_out):
        split_rows = list(block)
        judged = [row for row in split_rows if row.metrics is not None]
        print_lines(console, [_split_title(split_rows[0].split, cluster.name)])
        for build in (_placement_table, _steps_table) if judged else ():
            table = build(judged, True)
            wide = console.options.update(width=10 * console.width)
            fits = console.measure(table, options=wide).maximum <= console.width
            console.print(table if fits else build(judged, False))
        print_lines(console, [f"{row.name}: {remark}" for row in split_rows for remark in row.remarks])
        metrics = {row.name: row.metrics for row in judged if row.metrics is not None}
        print_lines(console, [*_describe_leads(metrics, settings), ""])
    legend = f"{LEGEND}; copies: beyond the first of each expert, over all layers, of {slots_per_layer} slots per layer"
    print_lines(console, [f"{legend}; localities and GPUs per token: at the largest B"])
    print_lines(console, [INTERVALS])


def _split_title(split: HeldOutSplit, cluster: str) -> str:
    solved, judged = int(split.solve_T.sum()), int(split.judge_T.sum())
    return (
        f"Held-out {split.held_out} on {cluster}: solved on {split.solved_on} ({solved} tokens), "
        f"judged on {split.judged_on} ({judged} tokens)"
    )


def _placement_table(rows: Sequence[ComparedPlan], with_intervals: bool) -> Table:
    """Loads stand without ±: their intervals are not symmetric (see ``placement.bootstrap``)."""
    names = ("pair_locality", "top1_transition_locality", "gpus_per_token")
    heads = ("pair\nlocality", "top-1\nlocality", "GPUs per\ntoken")
    table = plan_table("load\nmean", "load\nmax", *heads, "copies", "solved\nin s")
    for row in rows:
        assert row.metrics is not None
        size = max(row.metrics.by_batch_size)
        loads = [f"{load:.3f}" for load in (row.metrics.load_mean, row.metrics.load_max)]
        figures = asdict(row.metrics.by_batch_size[size])
        intervals = row.uncertainty[size].intervals
        cells = [_figure(figures[name], intervals[name] if with_intervals else None, 3) for name in names]
        seconds = "" if row.solution is None else f"{row.solution.seconds:.1f}"
        table.add_row(escape(row.name), *loads, *cells, str(row.copies), seconds)
    return table


def _steps_table(rows: Sequence[ComparedPlan], with_intervals: bool) -> Table:
    sizes = list(rows[0].uncertainty)
    table = plan_table(*(f"active\nB={size}" for size in sizes), *(f"µs\nB={size}" for size in sizes))
    for row in rows:
        assert row.metrics is not None
        cells = [f"{row.metrics.by_batch_size[size].active_ratio:.3f}" for size in sizes]
        for size in sizes:
            interval = row.uncertainty[size].intervals["step_us"] if with_intervals else None
            step_us = row.metrics.by_batch_size[size].step_us
            cells.append(_figure(step_us, interval, 0 if step_us >= LONG_STEP_US else 1))
        table.add_row(escape(row.name), *cells)
    return table


def _figure(value: float, interval: Interval | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if interval is None else f" ±{interval.half_width:.{digits}f}")


def _describe_leads(judged: Mapping[str, Metrics], settings: CompareSettings) -> list[str]:
    """Which plan is fastest at each batch size and by how much, and over the workload's mix of them."""
    if not judged:
        return []
    steps = settings.workload.steps()
    leads = [fastest(judged, size, settings.judge) for size, _ in steps]
    lines = [_describe_lead(lead) for lead in leads]
    if len(steps) > 1:
        means = {
            name: sum(share * metrics.by_batch_size[size].step_us for size, share in steps)
            for name, metrics in judged.items()
        }
        least = min(means, key=lambda name: means[name])
        lines.append(f"fastest over the workload's mix of these: {least}, {_significant(means[least])} µs")
    if any(lead.interval is not None for lead in leads):
        lines.append("these intervals cover the draw of steps from these tokens only, not other prompts")
    return lines


def _describe_lead(lead: Fastest) -> str:
    line = f"fastest at B={lead.batch_size}: {' = '.join(lead.plans)}"
    if lead.next_plan is None:
        return line
    line += f", {_significant(lead.ahead_us)} µs before {lead.next_plan} ({_significant(100 * lead.ahead)}%"
    if lead.interval is None:
        return f"{line})"
    low, high = (_significant(end) for end in lead.interval)
    return f"{line}; 95% interval {low} to {high} µs)"


def _significant(value: float) -> str:
    """A number to three significant digits and at most three decimals, without exponent and without ``-0``."""
    rounded = round(value, 3)
    if rounded == 0:
        return "0"
    decimals = min(3, max(0, 2 - math.floor(math.log10(abs(rounded)))))
    return f"{rounded:.{decimals}f}"


def describe_solution(objective: Objective, solution: Solution) -> str:
    """One line: value, bound and gap on the tokens solved on."""
    what, unit = {
        "step_time": ("expected step time", " µs"),
        "locality": ("locality", ""),
        "balance": ("mean busiest load", ""),
    }[objective.name]
    if solution.optimal:
        proof = "proven optimal"
    elif solution.bound is None or solution.gap is None:
        proof = "no bound known"
    else:
        proof = f"bound {solution.bound:.4f}, gap {100 * solution.gap:.2f}%"
    return f"{what} {solution.value:.4f}{unit} on the tokens solved on, {proof}, {solution.seconds:.1f} s"


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines as they are, without markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
