"""``python -m profiler info``: what is in a trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``info``."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="routing traces (.safetensors)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Print a summary of every trace.

    Raises:
        InputError: a trace cannot be read.
    """
    from profiler.summary import summary_table
    from profiler.trace_format import RoutingTrace

    for path in flags.traces:
        with RoutingTrace.open(path) as trace:
            console.print(summary_table(trace))
