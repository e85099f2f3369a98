"""Command line: ``python -m placement solve|compare|evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf import ConfigError, compose
from conf.command_line import Verb, run_command_line
from placement.atomic import write_atomically
from placement.strategies.ilp import Progress
from profiler.errors import InputError
from profiler.trace_header import require_output


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    verbs = [
        Verb(
            "solve",
            "Find where every expert goes, and write the plan.",
            "python -m placement solve --trace trace.safetensors -o plan.json cluster=h200x4 objective.max_load=1.15",
            _solve_arguments,
            _solve,
        ),
        Verb(
            "compare",
            "Judge every strategy on held-out tokens: table, JSON and plot.",
            "python -m placement compare --trace trace.safetensors -o compare.json cluster=h200x4 --plot compare.png",
            _compare_arguments,
            _compare,
        ),
        Verb(
            "evaluate",
            "Replay a trace through one plan.",
            "python -m placement evaluate --plan plan.json --trace trace.safetensors",
            _evaluate_arguments,
            _evaluate,
        ),
    ]
    description = "Decide which GPU holds which expert of a Mixture-of-Experts model."
    return run_command_line("placement", description, verbs, (InputError, ConfigError), arguments)


def _solve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, required=True, help="routing trace to solve on (even sequences)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the plan to write, plan.json")


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, required=True, help="routing trace (judged on odd sequences)")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--plan", type=Path, action="append", default=[], help="a plan to judge as well (repeatable)")
    parser.add_argument("--plot", type=Path, help="image of locality against balance to write")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, required=True, help="the plan to judge")
    parser.add_argument("--trace", type=Path, required=True, help="routing trace to replay")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")


def _solve(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from placement.report import describe_solution, print_lines, print_metrics
    from placement.settings import solve_settings
    from placement.workflow import solve_trace
    from profiler.trace_format import RoutingTrace

    settings = solve_settings(compose("solve", flags.overrides))
    require_output(flags.output, [flags.trace])
    with RoutingTrace.open(flags.trace) as trace, _progress() as progress:
        plan, solution, judged = solve_trace(trace, settings, flags.output, progress)
    plan.save(flags.output)
    names = {"contiguous": judged["contiguous"], "eplb": judged["eplb"], f"plan ({plan.strategy})": judged["plan"]}
    console = Console()
    title = f"Held-out tokens on {settings.cluster.name}, {plan.num_layers} layers of {plan.num_experts} experts"
    print_metrics(console, names, title)
    notes = list(solution.notes)
    if trace.expert_bytes is None:
        size = settings.model_size.expert_bytes
        notes.append(f"the trace does not tell expert_bytes: memory is not checked, step times assume {size} bytes")
    print_lines(console, [describe_solution(settings.objective, solution), *notes, f"wrote {flags.output}"])


def _compare(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from placement.provenance import describe_run
    from placement.report import check_plot, plot_comparison, print_lines, print_metrics
    from placement.settings import compare_settings
    from placement.workflow import compare_strategies, comparison_facts
    from profiler.trace_format import RoutingTrace

    settings = compare_settings(compose("compare", flags.overrides))
    inputs = [flags.trace, *flags.plan]
    for path in (flags.output, flags.plot):
        if path is not None:
            require_output(path, inputs)
            inputs.append(path)
    if flags.plot is not None:
        check_plot(flags.plot)
    with RoutingTrace.open(flags.trace) as trace, _progress() as progress:
        cluster, rows = compare_strategies(trace, settings, flags.plan, progress)
        shared = comparison_facts(trace, cluster, settings)
    judged = {row.name: row.metrics for row in rows if row.metrics is not None}
    console = Console()
    print_metrics(console, judged, f"Held-out tokens on {cluster.name}")
    print_lines(console, [f"{row.name}: {row.problem}" for row in rows if row.problem])
    if flags.output is not None:
        flat = [shared | facts for row in rows for facts in row.to_rows()]
        document = describe_run(("numpy", "pulp", "highspy", "scipy")) | {"rows": flat}
        write_atomically(flags.output, json.dumps(document, indent=1) + "\n")
        print_lines(console, [f"wrote {flags.output}"])
    if flags.plot is not None:
        plot_comparison(flags.plot, judged)
        print_lines(console, [f"wrote {flags.plot}"])


def _evaluate(flags: argparse.Namespace) -> None:
    from rich.console import Console

    from placement.evaluation import evaluate
    from placement.plan import PlacementPlan
    from placement.report import print_lines, print_metrics
    from placement.settings import batch_sizes, evaluation_cluster, judge_settings
    from profiler.trace_format import RoutingTrace

    config = compose("evaluate", flags.overrides)
    judge, sizes = judge_settings(config), batch_sizes(config)
    if flags.output is not None:
        require_output(flags.output, [flags.trace, flags.plan])
    plan = PlacementPlan.load(flags.plan)
    with RoutingTrace.open(flags.trace) as trace, _progress() as progress:
        progress("replaying")
        cluster = evaluation_cluster(plan, config, trace.expert_bytes)
        metrics = evaluate(plan, trace, cluster, config["split"], sizes, judge.batches, judge.seed)
    console = Console()
    print_metrics(console, {flags.plan.name: metrics}, f"{config['split'].capitalize()} sequences on {cluster.name}")
    if flags.output is not None:
        document = {"format": "placement-evaluation", "version": 1, "metrics": metrics.to_dict()}
        write_atomically(flags.output, json.dumps(document, indent=1) + "\n")
        print_lines(console, [f"wrote {flags.output}"])


@contextmanager
def _progress() -> Iterator[Progress]:
    """A line on stderr that says what is being done, where stderr is a terminal."""
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("reading") as status:
        yield lambda line: status.update(escape(line))


if __name__ == "__main__":
    sys.exit(main())
