"""``python -m profiler split``: one trace as several, by domain, phase or sequence."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from profiler.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``split``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace (.safetensors)")
    parser.add_argument(
        "--by", choices=("domain", "phase", "sequence"), required=True, help="what a part has in common"
    )
    parser.add_argument("--parts", metavar="SHARES", help="with --by sequence: shares of the sequences (0.5,0.5)")
    parser.add_argument("--seed", type=int, default=0, help="with --by sequence: of the draw (0)")
    parser.add_argument("--renumber", action="store_true", help="number each part's sequences 0, 1, … anew")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder for <TRACE>-<part>.safetensors"
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    """Split, and print what was written.

    Raises:
        InputError: the trace cannot be read or split in this way, or the files cannot be written.
    """
    from profiler.summary import print_written
    from profiler.trace_format import RoutingTrace
    from profiler.trace_split import by_domain, by_phase, by_sequence, split_trace

    if flags.parts is not None and flags.by != "sequence":
        raise InputError(f"--parts {flags.parts}: parts with shares are made of sequences; add --by sequence")
    shares = _read_shares(flags.parts or "0.5,0.5")
    with Console(stderr=True).status(f"splitting by {flags.by}"), RoutingTrace.open(flags.trace) as trace:
        if flags.by == "sequence":
            partition = by_sequence(trace, shares, flags.seed)
        else:
            partition = (by_domain if flags.by == "domain" else by_phase)(trace)
        paths = split_trace(trace, partition, flags.output, flags.renumber)
    print_written(console, paths)


def _read_shares(text: str) -> list[float]:
    try:
        return [float(share) for share in text.split(",")]
    except ValueError as error:
        raise InputError(f"--parts {text}: expected shares that add up to 1, such as 0.8,0.2") from error
