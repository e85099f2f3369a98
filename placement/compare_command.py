"""``python -m placement compare``: every strategy, judged on held-out tokens."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from placement.atomic import write_atomically
from placement.comparison import LEFT_OUT, compare_strategies, comparison_facts
from placement.held_out import has_domains
from placement.plots import check_plot, plot_comparison
from placement.problem import Progress
from placement.provenance import describe_run
from placement.report import print_comparison, print_lines
from placement.settings import compare_settings
from profiler.trace_format import RoutingTrace
from profiler.trace_header import require_output

NO_DOMAINS = "held-out domains are left out: the trace has tokens of fewer than two domains"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``compare``."""
    parser.add_argument("--trace", type=Path, required=True, help="routing trace to solve on and to judge on")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a plan to judge as well (repeatable)")
    parser.add_argument("--plot", type=Path, help="image of locality against balance, and of step times, to write")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Compare every strategy and plan; print tables, and write rows and a picture where asked.

    Raises:
        InputError: the settings, the trace or a plan cannot be used, or an output cannot be written.
    """
    settings = compare_settings(config)
    inputs = [flags.trace, *dict.fromkeys(flags.plan)]
    for path in (flags.output, flags.plot):
        if path is not None:
            require_output(path, inputs)
            inputs.append(path)
    if flags.plot is not None:
        check_plot(flags.plot)
    with RoutingTrace.open(flags.trace) as trace:
        cluster, rows = compare_strategies(trace, settings, flags.plan, progress)
        shared = comparison_facts(trace, cluster, settings)
        assumed = trace.expert_bytes is None
        skipped = "domains" in settings.held_out and not has_domains(trace)
    print_comparison(console, cluster, rows, settings, shared["slots"] // shared["layers"])
    notes = [f"{name}: {LEFT_OUT}" for name in settings.left_out] + ([NO_DOMAINS] if skipped else [])
    if assumed:
        notes.append(f"the trace does not tell expert_bytes: workload.expert_bytes={shared['expert_bytes']} is assumed")
    print_lines(console, notes)
    if flags.output is not None:
        flat = [shared | facts for row in rows for facts in row.to_rows()]
        document = describe_run(("numpy", "numba", "pulp", "highspy", "scipy")) | {"rows": flat}
        write_atomically(flags.output, json.dumps(document, indent=1) + "\n")
        print_lines(console, [f"wrote {flags.output}"])
    if flags.plot is not None:
        plot_comparison(flags.plot, rows)
        print_lines(console, [f"wrote {flags.plot}"])
