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
    from profiler.routing_counts import RoutingCounts
    from profiler.routing_source import open_routing
    from profiler.summary import counts_table, summary_table

    for path in flags.traces:
        source = open_routing(path)
        if isinstance(source, RoutingCounts):
            console.print(counts_table(path, source))
        else:
            with source:
                console.print(summary_table(source))
