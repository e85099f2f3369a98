"""``python -m placement simulate``: a trace replayed on a cluster that is not there."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from placement.atomic import write_atomically
from placement.cluster import Cluster
from placement.problem import Progress
from placement.provenance import describe_run
from placement.report import plan_table, print_lines
from placement.simulate import SimulatedPlan, SimulateSettings, memory_bytes, simulate, simulate_settings
from profiler.trace_format import RoutingTrace
from profiler.trace_header import require_output

LEGEND = (
    "load: busiest GPU / mean; GB: experts' weights on the fullest GPU; B: tokens of one step over the whole cluster; "
    "active: busiest GPU's active experts / even share; NVLink, network: bytes of hidden states per step, over all GPUs"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``simulate``."""
    parser.add_argument(
        "--trace", type=Path, required=True, help="routing trace (solved on even, replayed on odd ones)"
    )
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a plan to replay as well (repeatable)")


def run(flags: argparse.Namespace, config: Mapping[str, Any], console: Console, progress: Progress) -> None:
    """Simulate every strategy and plan; print tables, and write rows where asked.

    Raises:
        InputError: the settings, the trace or a plan cannot be used, or the output cannot be written.
    """
    settings = simulate_settings(config)
    others = list(dict.fromkeys(flags.plan))
    if flags.output is not None:
        require_output(flags.output, [flags.trace, *others])
    with RoutingTrace.open(flags.trace) as trace:
        cluster, rows = simulate(trace, settings, others, progress)
        shared = _facts(trace, cluster, settings)
    notes = [] if shared["trace_expert_bytes"] else [f"the trace does not tell expert_bytes: {_size(cluster)} assumed"]
    print_simulation(console, cluster, rows, settings)
    print_lines(console, [*notes, *(f"{row.name}: {row.problem}" for row in rows if row.problem)])
    if flags.output is not None:
        flat = [shared | facts for row in rows for facts in row.to_rows(cluster.coefficients[0].expert_bytes)]
        document = describe_run(("numpy", "numba", "pulp", "highspy", "scipy")) | {"rows": flat}
        write_atomically(flags.output, json.dumps(document, indent=1) + "\n")
        print_lines(console, [f"wrote {flags.output}"])


def print_simulation(
    console: Console, cluster: Cluster, rows: Sequence[SimulatedPlan], settings: SimulateSettings
) -> None:
    """Two tables: one row per plan, and one per plan and number of tokens in a step."""
    plans = plan_table("load\nmean", "load\nmax", "GPUs per\ntoken", "GB per GPU\nof experts", "solved\nin s")
    steps = plan_table("B", "step\nµs", "experts\nµs", "exchange\nµs", "active", "NVLink\nMB", "network\nMB")
    for row in rows:
        if row.plan is None or row.metrics is None:
            continue
        memory = max(memory_bytes(row.plan.slots, cluster.coefficients[0].expert_bytes))
        last = row.metrics.by_batch_size[settings.workload.batch_sizes[-1]]
        plans.add_row(
            escape(row.name),
            f"{row.metrics.load_mean:.3f}",
            f"{row.metrics.load_max:.3f}",
            f"{last.gpus_per_token:.2f}",
            f"{memory / 1e9:.2f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
        )
        for size, figures in row.metrics.by_batch_size.items():
            times = [f"{time:.0f}" for time in (figures.step_us, figures.expert_us, figures.exchange_us)]
            sent = [f"{sent / 1e6:.2f}" for sent in (figures.nvlink_bytes, figures.network_bytes)]
            steps.add_row(escape(row.name), str(size), *times, f"{figures.active_ratio:.2f}", *sent)
    gpus = f"{cluster.num_gpus} GPUs, {cluster.gpus_per_node} per node"
    print_lines(console, [f"Held-out tokens on {cluster.name} ({gpus}), exchange {settings.workload.exchange}"])
    console.print(plans)
    console.print(steps)
    print_lines(console, [LEGEND])


def _size(cluster: Cluster) -> str:
    return f"{cluster.coefficients[0].expert_bytes} bytes"


def _facts(trace: RoutingTrace, cluster: Cluster, settings: SimulateSettings) -> dict[str, Any]:
    """What all rows share: model, trace, cluster and how plans were replayed."""
    coefficients = cluster.coefficients[0]
    return {
        "model": Path(trace.model).name,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "trace_sha256": trace.sha256(),
        "trace_expert_bytes": trace.expert_bytes,
        "expert_bytes": coefficients.expert_bytes,
        "hidden_state_bytes": coefficients.hidden_state_bytes,
        "cluster": cluster.name,
        "nodes": cluster.nodes,
        "gpus": cluster.num_gpus,
        "exchange": settings.workload.exchange,
        "dispatch_rule": settings.dispatch.rule,
        "split_above_tokens": settings.dispatch.split_above_tokens,
        "most_steps": settings.judge.batches,
        "seed": settings.judge.seed,
    }
