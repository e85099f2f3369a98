"""``python -m profiler report``: everything a trace tells, as one HTML file that opens offline."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``report``."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="a routing trace, or routing counts (.safetensors)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the page to write (.html)")


def run(flags: argparse.Namespace, console: Console) -> None:
    """Profile the source, write the page and say what stands in it.

    Raises:
        InputError: the source cannot be read, or the output cannot be written.
    """
    from profiler.profile_builder import profile_file
    from profiler.report import render_report
    from profiler.report.summary import summarize
    from profiler.trace_header import require_output, write_text

    require_output(flags.output, [flags.trace])
    with console.status("counting"):
        profile = profile_file(flags.trace, predictability=True)
    write_text(flags.output, render_report(profile))
    for finding in summarize(profile):
        console.print(finding.text, markup=False, highlight=False)
    size_mb = flags.output.stat().st_size / 1e6
    console.print(f"{flags.output}: {size_mb:.1f} MB, open it in a browser", markup=False, highlight=False)
