"""``python -m profiler merge``: several traces of one model as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``merge``."""
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="two or more traces of one model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trace to write (.safetensors)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Merge, and print what was written and what could not be kept.

    Raises:
        InputError: the traces cannot be read or are not of one model, or the output cannot be written.
    """
    from profiler.summary import print_written
    from profiler.trace_merge import merge_traces

    with Console(stderr=True).status(f"merging {len(flags.traces)} traces"):
        notes = merge_traces(flags.traces, flags.output)
    print_written(console, [flags.output], notes)
