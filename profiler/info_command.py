"""``python -m profiler info``: what is in a trace, or in a file of counts."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``info``."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="routing traces or counts (.safetensors)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Print a summary of every trace and of every file of counts.

    Raises:
        InputError: a file cannot be read.
    """
    from profiler.tables import counts_table, summary_table
    from profiler.trace_format import RoutingCounts, RoutingTrace
    from profiler.trace_header import COUNTS_FORMAT, read_header

    for path in flags.traces:
        if read_header(path)[0].get("format") == COUNTS_FORMAT:
            console.print(counts_table(path, RoutingCounts.open(path)))
            continue
        with RoutingTrace.open(path) as trace:
            console.print(summary_table(trace))
