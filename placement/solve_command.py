"""``python -m placement solve``: from a trace, or from counts, to a plan."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from placement.memory import copy_price, describe_price
from placement.plan import PlacementPlan
from placement.problem import Progress, Solution
from placement.report import describe_solution, print_lines, print_metrics
from placement.settings import SolveSettings, solve_settings
from placement.workflow import SolvedTrace, solve_counts, solve_trace
from profiler.routing_counts import RoutingCounts
from profiler.trace_format import RoutingTrace
from profiler.trace_header import COUNTS_FORMAT, read_header, require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``solve``."""
    parser.add_argument(
        "--trace", type=Path, required=True, help="routing trace to solve on (even sequences), or routing counts"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the plan to write, plan.json")
    parser.add_argument("--running", type=Path, help="a plan that is being served, to start from (see max_moves)")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Solve, write the plan, and print what it should gain on held-out tokens.

    Raises:
        InputError: the settings or files cannot be used, or the problem has no solution.
    """
    settings = solve_settings(config)
    require_output(flags.output, [flags.trace, *([flags.running] if flags.running else [])])
    running = PlacementPlan.load(flags.running) if flags.running else None
    if read_header(flags.trace)[0].get("format") == COUNTS_FORMAT:
        counts = RoutingCounts.open(flags.trace)
        plan, solution = solve_counts(counts, settings, flags.output, progress, running)
        plan.save(flags.output)
        notes = ["solved on counts: nothing is held out, and step times are not predicted"]
        print_lines(console, [*_describe(plan, solution, settings, None), *notes, f"wrote {flags.output}"])
        return
    with RoutingTrace.open(flags.trace) as trace:
        solved = solve_trace(trace, settings, flags.output, progress, running)
        expert_bytes = trace.expert_bytes
    plan = solved.plan
    plan.save(flags.output)
    judged = dict(solved.judged)
    judged[f"plan ({settings.objective.name})"] = judged.pop("plan")
    title = f"Held-out tokens on {settings.cluster.name}, {plan.num_layers} layers of {plan.num_experts} experts"
    print_metrics(console, judged, title)
    lines = [*_describe(plan, solved.solution, settings, expert_bytes), *_describe_moves(solved, expert_bytes)]
    print_lines(console, [*lines, f"wrote {flags.output}"])


def _describe(plan: PlacementPlan, solution: Solution, settings: SolveSettings, expert_bytes: int | None) -> list[str]:
    """Value, bound and gap; the solver's notes; the price of copies."""
    size = expert_bytes or settings.model_size.expert_bytes
    price = copy_price(plan.slots, plan.num_experts, plan.num_layers, size, settings.memory.kv_bytes_per_token)
    lines = [describe_solution(settings.objective, solution), *solution.notes, describe_price(price)]
    if expert_bytes is None:
        lines.append(f"the input does not tell expert_bytes: workload.expert_bytes={size} is assumed")
    return lines


def _describe_moves(solved: SolvedTrace, expert_bytes: int | None) -> list[str]:
    """How many copies move from the running plan."""
    if "running" not in solved.judged:
        return []
    size = "" if expert_bytes is None else f", {len(solved.moves) * expert_bytes:.4g} bytes"
    return [f"{len(solved.moves)} expert copies move from the running plan{size}; the list is in the plan's migration"]
