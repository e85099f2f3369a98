"""``python -m placement export``: a plan as the placement file of a serving engine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from placement.atomic import write_atomically
from placement.engines import ENGINES, configured_layers, layout_of_plan
from placement.errors import PlanError
from placement.plan import PlacementPlan
from placement.problem import Progress
from profiler.trace_header import require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``export``."""
    parser.add_argument("--plan", type=Path, required=True, help="the plan to export")
    parser.add_argument("--to", dest="engine", choices=list(ENGINES), required=True, help="whose format to write")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the engine's file to write")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Write the engine's file; say what to start the engine with, and what the file cannot carry.

    Raises:
        InputError: the plan cannot be read or is uneven, or the file cannot be written.
    """
    from placement.report import print_lines

    engine = ENGINES[flags.engine]
    if engine.suffixes and flags.output.suffix not in engine.suffixes:
        raise PlanError(f"{flags.output}: {engine.title} reads a file that ends in {' or '.join(engine.suffixes)}")
    if config["num_layers"] is not None and flags.engine != "sglang":
        raise PlanError(
            f"num_layers {config['num_layers']!r}: {engine.title}'s file has rows for MoE layers alone; "
            "leave num_layers away, it is for --to sglang"
        )
    require_output(flags.output, [flags.plan])
    progress("reading the plan")
    plan = PlacementPlan.load(flags.plan)
    num_layers, notes = _num_layers(plan, flags.plan, config["num_layers"]) if flags.engine == "sglang" else (None, [])
    layout = layout_of_plan(plan, engine, num_layers)
    write_atomically(flags.output, engine.write(layout))
    notes.append("not in the file: the plan's predictions, and the trace and solver they come from")
    if plan.has_copies:
        notes.append(
            f"nor its dispatch rule, {plan.dispatch.rule!r}: {engine.title} chooses among copies by a rule of its own, "
            "so what was predicted for the copies need not hold there"
        )
    summary = (
        f"{plan.num_layers} MoE layers of {plan.num_experts} experts, {layout.num_slots} slots on {plan.num_gpus} GPUs"
    )
    start = [f"  {line}" for line in engine.start(layout, flags.output)]
    print_lines(console, [summary, *notes, f"start {engine.title} with:", *start, f"wrote {flags.output}"])


def _num_layers(plan: PlacementPlan, path: Path, given: object) -> tuple[Any, list[str]]:
    """Decoder layers of the model: as given, as its configuration says, or up to the last MoE layer with a note."""
    found = configured_layers(plan.resolve_model(path)) if given is None else given
    if found is not None:
        return found, []
    least = plan.layer_ids[-1] + 1
    note = (
        f"the model's config.json is not at hand: wrote {least} layers, up to the last MoE layer; "
        "add num_layers=N if dense layers follow it"
    )
    return least, [note]
