"""``python -m profiler stats``: statistics of a trace or of counts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from profiler.errors import InputError

if TYPE_CHECKING:
    from profiler.profile import RoutingProfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``stats``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace or routing counts (.safetensors)")
    parser.add_argument(
        "--predictability",
        action="store_true",
        help="also learn predictors of every layer's experts on even sequences, and judge them on odd ones",
    )
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
    from profiler.predictors.table import predictability_table
    from profiler.profile_builder import profile_file
    from profiler.tables import batch_table, closing_lines, group_table, layer_table
    from profiler.trace_header import require_output

    if flags.output is not None:
        require_output(flags.output, [flags.trace])
    with console.status("counting"):
        profile = profile_file(flags.trace, flags.predictability)
        if flags.output is not None:
            _write(profile, flags.trace, flags.output)
    console.print(layer_table(profile))
    if profile.tokens_by_phase:
        console.print(group_table(profile))
    if profile.active is not None:
        console.print(batch_table(profile.active))
    if profile.predictors:
        console.print(predictability_table(profile.predictors))
    elif flags.predictability:
        console.print("predictability: not judged, because it takes a trace with even and odd sequences")
    for line in closing_lines(profile):
        console.print(line)


def _write(profile: RoutingProfile, source: Path, output: Path) -> None:
    """All figures as JSON, or the counts behind them as safetensors."""
    from profiler.profile_json import profile_to_dict
    from profiler.statistics import collect_by_domain, save_statistics
    from profiler.trace_format import RoutingTrace
    from profiler.trace_header import write_text

    if output.suffix == ".json":
        write_text(output, json.dumps(profile_to_dict(profile), indent=1) + "\n")
    elif profile.statistics is None:
        raise InputError(f"{output}: counts have no further counts behind them; name a .json file")
    else:
        with RoutingTrace.open(source, validate=False) as trace:
            by_domain = {} if trace.domains is None else collect_by_domain(trace)
            save_statistics(trace, output, profile.statistics, by_domain)
