"""``python -m profiler stats``: statistics of a trace, per layer and per domain."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``stats``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace (.safetensors)")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts behind the tables (.safetensors)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Print tables, and write the counts where an output is named.

    Raises:
        InputError: the trace cannot be read, or the output cannot be written.
    """
    from profiler.statistics import collect_by_domain, collect_statistics, save_statistics
    from profiler.tables import domain_table, layer_table
    from profiler.trace_format import RoutingTrace
    from profiler.trace_header import require_output

    if flags.output is not None:
        require_output(flags.output, [flags.trace])
    with RoutingTrace.open(flags.trace) as trace:
        statistics = collect_statistics(trace)
        by_domain = {} if trace.domains is None else collect_by_domain(trace)
        if flags.output is not None:
            save_statistics(trace, flags.output, statistics, by_domain)
        console.print(layer_table(trace, statistics))
        if by_domain:
            console.print(domain_table(statistics, by_domain))
