"""Measure the figures that the placement engine has to reach, on the public trace and on synthetic routing.

    python -m benchmarks.placement_figures                   # all groups, then tables and plots of docs/placement.md
    python -m benchmarks.placement_figures balance active    # some groups
    python -m benchmarks.placement_figures --document        # tables and plots alone, from the files of results

Each group writes benchmarks/results/placement_GROUP.json. The trace is gpt-oss-20b.safetensors in the folder that
EXPERTPLAN_TRACES names (default ../shared/traces).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.placement_figures.common import RESULTS, Row
from benchmarks.placement_figures.document import write_document
from benchmarks.placement_figures.plots import write_plots
from placement.atomic import write_atomically
from placement.provenance import describe_run

GROUPS = ("locality", "balance", "active", "step_time", "scale")
PACKAGES = ("numpy", "numba", "pulp", "highspy", "scipy", "networkx")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    assert __doc__ is not None
    summary, example = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.placement_figures",
        description=summary,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"some of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--document", action="store_true", help="tables and plots of docs/placement.md alone")
    flags = parser.parse_args(arguments)
    unknown = sorted(set(flags.groups) - set(GROUPS))
    if unknown:
        parser.error(f"group {unknown[0]!r}: expected some of {', '.join(GROUPS)}")
    console = Console()
    if not flags.document:
        for group in dict.fromkeys(flags.groups or GROUPS):
            measure(group, console)
    write_document()
    write_plots()


def measure(group: str, console: Console) -> None:
    """Measure one group, write its file of results and print its table."""
    started = time.perf_counter()
    with console.status(group) as status:
        rows: list[Row] = import_module(f"benchmarks.placement_figures.{group}").measure(
            lambda line: status.update(f"{group}: {line}")
        )
    path = RESULTS / f"placement_{group}.json"
    write_atomically(path, json.dumps(describe_run(PACKAGES) | {"rows": rows}, indent=1, ensure_ascii=False) + "\n")
    console.print(figures_table(group, rows))
    console.print(f"{group}: {time.perf_counter() - started:.0f} s, wrote {path}", highlight=False)


def figures_table(group: str, rows: Sequence[Row]) -> Table:
    """The rows that have a target."""
    table = Table("figure", "reach", "got", "ok", title=group, box=box.SIMPLE_HEAD)
    for row in rows:
        if row.get("target") is not None:
            ok = "[green]yes[/]" if row["ok"] else "[red]no[/]"
            table.add_row(row["figure"], f"{row['relation']} {row['target']:.5g}", f"{row['value']:.5g}", ok)
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
