"""``python -m profiler stats``: statistics of a trace or of counts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from profiler.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``stats``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace or routing counts (.safetensors)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="also write the counts behind the tables (.safetensors, a trace's only), or all figures (.json)",
    )


def run(flags: argparse.Namespace, console: Console) -> None:
    """Print tables, and write what is behind them where an output is named.

    Raises:
        InputError: the source cannot be read, or the output cannot be written.
    """
    from profiler.profile_builder import profile_counts, profile_trace
    from profiler.profile_json import profile_to_dict
    from profiler.routing_counts import RoutingCounts
    from profiler.routing_source import open_routing
    from profiler.statistics import collect_by_domain, save_statistics
    from profiler.tables import batch_table, closing_lines, group_table, layer_table
    from profiler.trace_header import require_output, write_text

    if flags.output is not None:
        require_output(flags.output, [flags.trace])
    source = open_routing(flags.trace)
    as_json = flags.output is not None and flags.output.suffix == ".json"
    if isinstance(source, RoutingCounts):
        if flags.output is not None and not as_json:
            raise InputError(f"{flags.output}: counts have no further counts behind them; name a .json file")
        profile = profile_counts(source, flags.trace.name)
    else:
        profile = profile_trace(source)
        if flags.output is not None and not as_json and profile.statistics is not None:
            by_domain = {} if source.domains is None else collect_by_domain(source)
            save_statistics(source, flags.output, profile.statistics, by_domain)
    if as_json:
        write_text(flags.output, json.dumps(profile_to_dict(profile), indent=1) + "\n")
    console.print(layer_table(profile))
    if profile.tokens_by_phase:
        console.print(group_table(profile))
    if profile.active is not None:
        console.print(batch_table(profile.active))
    for line in closing_lines(profile):
        console.print(line)
