"""Command line of the profiler: ``python -m profiler trace|import|info|stats|report|merge|split|sample``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from conf import ConfigError, compose
from conf.command_line import Verb, run_command_line
from profiler.errors import InputError


def _add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trace to write (.safetensors)")


def _run_trace(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from profiler.settings import TraceSettings
    from profiler.summary import summary_table
    from profiler.trace_command import record_trace
    from profiler.trace_format import RoutingTrace

    record_trace(TraceSettings.from_dict(compose("trace", flags.overrides)), flags.output)
    with RoutingTrace.open(flags.output) as trace:
        Console().print(summary_table(trace))


def _verb(name: str, help_line: str, example: str) -> Verb:
    """A verb without settings, from its module ``<name>_command``."""
    module = import_module(f"profiler.{name}_command")

    def run(flags: argparse.Namespace) -> None:
        from rich.console import Console

        if flags.overrides:
            raise InputError(f"{name} takes no settings, but got {' '.join(flags.overrides)}")
        module.run(flags, Console())

    return Verb(name, help_line, example, module.add_arguments, run)


def _verbs() -> list[Verb]:
    return [
        Verb(
            "trace",
            "run prompts through an MoE model and record every token's routes",
            "python -m profiler trace model=examples/demo-moe prompts=examples/prompts/solve.jsonl "
            "-o trace.safetensors",
            _add_trace_arguments,
            _run_trace,
        ),
        _verb(
            "import",
            "a serving engine's recording as a trace, or as counts",
            "python -m profiler import --from sglang dump_0.pt dump_1.pt --like MODEL -o trace.safetensors",
        ),
        _verb("info", "what is in a trace", "python -m profiler info trace.safetensors"),
        _verb(
            "stats",
            "statistics of a trace, per layer and per domain",
            "python -m profiler stats trace.safetensors -o statistics.safetensors",
        ),
        _verb(
            "report",
            "popularity, affinity, drift and predictability on one page that opens offline",
            "python -m profiler report trace.safetensors -o report.html",
        ),
        _verb(
            "merge",
            "several traces of one model as one",
            "python -m profiler merge monday.safetensors tuesday.safetensors -o week.safetensors",
        ),
        _verb(
            "split",
            "one trace as several, by domain, phase or sequence",
            "python -m profiler split trace.safetensors --by sequence --parts 0.8,0.2 -o parts",
        ),
        _verb(
            "sample",
            "some sequences or tokens of a trace, drawn at random",
            "python -m profiler sample trace.safetensors --tokens 100000 -o small.safetensors",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the profiler's command line (default: ``sys.argv``) and return its exit code."""
    description = "Record how an MoE model routes its tokens to experts, and explain it."
    return run_command_line("profiler", description, _verbs(), (InputError, ConfigError), arguments)


if __name__ == "__main__":
    sys.exit(main())
