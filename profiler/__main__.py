"""Command line of the profiler: ``python -m profiler trace|info|stats``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from conf import ConfigError, compose
from conf.command_line import Verb, run_command_line
from profiler.errors import InputError


def _add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trace to write (.safetensors)")


def _run_trace(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from profiler.settings import TraceSettings
    from profiler.tables import summary_table
    from profiler.trace_command import record_trace
    from profiler.trace_format import RoutingTrace

    record_trace(TraceSettings.from_dict(compose("trace", flags.overrides)), flags.output)
    with RoutingTrace.open(flags.output) as trace:
        Console().print(summary_table(trace))


def _add_info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="routing traces (.safetensors)")


def _run_info(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from profiler.tables import summary_table
    from profiler.trace_format import RoutingTrace

    _refuse_overrides(flags)
    for path in flags.traces:
        with RoutingTrace.open(path) as trace:
            Console().print(summary_table(trace))


def _add_stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace (.safetensors)")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts behind the tables (.safetensors)")


def _run_stats(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from profiler.statistics import collect_by_domain, collect_statistics, save_statistics
    from profiler.tables import domain_table, layer_table
    from profiler.trace_format import RoutingTrace
    from profiler.trace_header import require_output

    _refuse_overrides(flags)
    if flags.output is not None:
        require_output(flags.output, [flags.trace])
    with RoutingTrace.open(flags.trace) as trace:
        statistics = collect_statistics(trace)
        by_domain = {} if trace.domains is None else collect_by_domain(trace)
        if flags.output is not None:
            save_statistics(trace, flags.output, statistics, by_domain)
        Console().print(layer_table(trace, statistics))
        if by_domain:
            Console().print(domain_table(statistics, by_domain))


def _refuse_overrides(flags: argparse.Namespace) -> None:
    if flags.overrides:
        raise InputError(f"{flags.verb} takes no settings, but got {' '.join(flags.overrides)}")


VERBS = (
    Verb(
        "trace",
        "run prompts through an MoE model and record every token's routes",
        "python -m profiler trace model=examples/demo-moe prompts=examples/prompts/solve.jsonl -o trace.safetensors",
        _add_trace_arguments,
        _run_trace,
    ),
    Verb("info", "what is in a trace", "python -m profiler info trace.safetensors", _add_info_arguments, _run_info),
    Verb(
        "stats",
        "statistics of a trace, per layer and per domain",
        "python -m profiler stats trace.safetensors -o statistics.safetensors",
        _add_stats_arguments,
        _run_stats,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the profiler's command line (default: ``sys.argv``) and return its exit code."""
    description = "Record how an MoE model routes its tokens to experts, and explain it."
    return run_command_line("profiler", description, VERBS, (InputError, ConfigError), arguments)


if __name__ == "__main__":
    sys.exit(main())
