"""``python -m profiler sample``: some sequences or tokens of a trace, drawn at random."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from profiler.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``sample``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace (.safetensors)")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--tokens", type=int, metavar="N", help="whole sequences with N tokens together, or few more")
    size.add_argument("--sequences", type=int, metavar="N", help="N sequences")
    size.add_argument("--per-domain", type=int, metavar="N", help="N sequences of every domain")
    parser.add_argument("--single-tokens", action="store_true", help="with --tokens: exactly N, wherever they stand")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--renumber", action="store_true", help="number the sequences 0, 1, … anew")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the trace to write (.safetensors)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Draw, and print what was written.

    Raises:
        InputError: the trace cannot be read or is too small, or the output cannot be written.
    """
    from profiler import trace_sample
    from profiler.summary import print_written
    from profiler.trace_format import RoutingTrace
    from profiler.trace_header import require_output
    from profiler.trace_split import write_selection

    if flags.single_tokens and flags.tokens is None:
        raise InputError("--single-tokens: tokens are drawn where --tokens says how many; add --tokens N")
    require_output(flags.output, [flags.trace])
    with Console(stderr=True).status("sampling"), RoutingTrace.open(flags.trace) as trace:
        if flags.sequences is not None:
            keep_T = trace_sample.draw_sequences(trace, flags.sequences, flags.seed)
        elif flags.per_domain is not None:
            keep_T = trace_sample.draw_per_domain(trace, flags.per_domain, flags.seed)
        elif flags.single_tokens:
            keep_T = trace_sample.draw_single_tokens(trace, flags.tokens, flags.seed)
        else:
            keep_T = trace_sample.draw_tokens(trace, flags.tokens, flags.seed)
        write_selection(trace, keep_T, flags.output, flags.renumber)
    print_written(console, [flags.output])
