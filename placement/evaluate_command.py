"""``python -m placement evaluate``: one plan replayed on one trace."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from placement.atomic import write_atomically
from placement.comparison import cost_facts
from placement.evaluation import evaluate
from placement.plan import PlacementPlan
from placement.problem import Progress
from placement.report import print_lines, print_metrics
from placement.settings import batch_sizes, evaluation_cluster, judge_settings
from profiler.trace_format import RoutingTrace
from profiler.trace_header import require_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``evaluate``."""
    parser.add_argument("--plan", type=Path, required=True, help="the plan to judge")
    parser.add_argument("--trace", type=Path, required=True, help="routing trace to replay")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Replay, print the metrics, and write them where asked.

    Raises:
        InputError: the settings or files cannot be used, or do not belong together.
    """
    judge, sizes = judge_settings(config), batch_sizes(config)
    if flags.output is not None:
        require_output(flags.output, [flags.trace, flags.plan])
    plan = PlacementPlan.load(flags.plan)
    with RoutingTrace.open(flags.trace) as trace:
        progress("replaying")
        cluster = evaluation_cluster(plan, config, trace.expert_bytes)
        told, sha256 = trace.expert_bytes, trace.sha256()
        metrics = evaluate(plan, trace, cluster, config["split"], sizes, judge.batches, judge.seed)
    print_metrics(console, {flags.plan.name: metrics}, f"{config['split'].capitalize()} sequences on {cluster.name}")
    facts = cost_facts(cluster)
    if told is None:
        source = "the plan's cluster" if plan.cluster.get("coefficients") else "the setting expert_bytes"
        print_lines(
            console, [f"the trace does not tell expert_bytes: {facts['expert_bytes']} is assumed, from {source}"]
        )
    if flags.output is not None:
        document = {
            "format": "placement-evaluation",
            "version": 1,
            "plan": flags.plan.name,
            "trace_sha256": sha256,
            "split": config["split"],
            "cluster": cluster.name,
            "exchange": plan.workload.exchange,
            "batches": judge.batches,
            "repeats": {str(size): len(drawn.step_us) for size, drawn in metrics.samples.items()},
            "seed": judge.seed,
            **facts,
            "metrics": metrics.to_dict(),
        }
        write_atomically(flags.output, json.dumps(document, indent=1) + "\n")
        print_lines(console, [f"wrote {flags.output}"])
