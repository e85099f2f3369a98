"""``python -m placement import``: a serving engine's placement file as a plan."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from placement.engines import ENGINES, ModelLayers, configured_layers, read_slots
from placement.plan import PlacementPlan
from placement.problem import Progress
from placement.workflow import portable_model
from profiler.trace_format import RoutingTrace
from profiler.trace_header import require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``import``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the engine's file")
    parser.add_argument("--from", dest="engine", choices=list(ENGINES), required=True, help="whose format it has")
    parser.add_argument(
        "--like", type=Path, required=True, help="a plan, or a trace (.safetensors), of the model that the file is for"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the plan to write, plan.json")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Write the plan that the engine's file describes.

    Raises:
        InputError: a file cannot be read or written, is another engine's, or does not fit the model.
    """
    from placement.report import print_lines

    require_output(flags.output, [flags.file, flags.like])
    progress("reading")
    fields, model, like_gpus = _like(flags.like)
    layers = ModelLayers(fields["num_experts"], fields["layer_ids"], configured_layers(model))
    slots = read_slots(flags.file, flags.engine, layers, config["gpus"], like_gpus)
    notes = []
    if like_gpus is not None and like_gpus != len(slots[0]):
        fields["cluster"] = {}
        notes.append(f"{flags.like} is for {like_gpus} GPUs, the file for {len(slots[0])}: the plan names no cluster")
    plan = PlacementPlan(
        **fields,
        model=portable_model(model, flags.output),
        slots=slots,
        strategy="imported",
        objective={"name": "none", "settings": {}},
        solver={"name": "imported", "source": flags.engine, "file": flags.file.name},
    )
    plan.save(flags.output)
    summary = (
        f"{plan.num_layers} MoE layers of {plan.num_experts} experts on {plan.num_gpus} GPUs, "
        f"{sum(map(len, plan.slots[0]))} slots in each"
    )
    print_lines(console, [summary, *notes, f"wrote {flags.output}"])


def _like(path: Path) -> tuple[dict[str, Any], str, int | None]:
    """What a plan or a trace says of its model: fields of a plan, the model, and a plan's number of GPUs."""
    if path.suffix == ".safetensors":
        with RoutingTrace.open(path, validate=False) as trace:
            return _model_fields(trace), trace.model, None
    plan = PlacementPlan.load(path)
    served = {"cluster": plan.cluster, "workload": plan.workload, "dispatch": plan.dispatch}
    return _model_fields(plan) | served, plan.resolve_model(path), plan.num_gpus


def _model_fields(source: RoutingTrace | PlacementPlan) -> dict[str, Any]:
    names = ("model_fingerprint", "num_experts", "top_k", "layer_ids")
    return {name: getattr(source, name) for name in names}
