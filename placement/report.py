"""What the command line shows: tables and a plot of judged plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from placement.errors import ProblemError
from placement.metrics import Metrics
from placement.problem import Objective, Solution

LEGEND = (
    "load: busiest GPU / mean; active: busiest GPU's active experts / even share; "
    "µs: predicted time of a step's MoE layers; B: tokens per step"
)


def print_metrics(console: Console, rows: Mapping[str, Metrics], title: str) -> None:
    """Two tables, one row per plan: load and locality; active ratio and step time by tokens per step (B)."""
    sizes = list(next(iter(rows.values())).by_batch_size)
    print_lines(console, [title])
    placement = _table("load\nmean", "load\nmax", "pair\nlocality", "top-1\nlocality", "GPUs per\ntoken")
    steps = _table(*(f"active\nB={size}" for size in sizes), *(f"µs\nB={size}" for size in sizes))
    for name, metrics in rows.items():
        by_size = [metrics.by_batch_size[size] for size in sizes]
        last = by_size[-1]
        localities = [last.pair_locality, last.top1_transition_locality]
        figures = [f"{figure:.3f}" for figure in (metrics.load_mean, metrics.load_max, *localities)]
        placement.add_row(name, *figures, f"{last.gpus_per_token:.2f}")
        steps.add_row(name, *(f"{m.active_ratio:.3f}" for m in by_size), *(f"{m.step_us:.0f}" for m in by_size))
    console.print(placement)
    console.print(steps)
    print_lines(console, [LEGEND])


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("plan")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def describe_solution(objective: Objective, solution: Solution) -> str:
    """One line: value, bound and gap on the tokens solved on."""
    what = "locality" if objective.name == "locality" else "mean busiest load"
    if solution.optimal:
        proof = "proven optimal"
    elif solution.bound is None or solution.gap is None:
        proof = "no bound known"
    else:
        proof = f"bound {solution.bound:.4f}, gap {100 * solution.gap:.2f}%"
    return f"{what} {solution.value:.4f} on the tokens solved on, {proof}, {solution.seconds:.1f} s"


def plot_comparison(path: Path, rows: Mapping[str, Metrics]) -> None:
    """Locality against balance, one point per plan, written as an image.

    Raises:
        ProblemError: the file's suffix is no image format, or it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for name, metrics in rows.items():
        locality = list(metrics.by_batch_size.values())[-1].pair_locality
        axes.scatter(metrics.load_mean, locality)
        axes.annotate(name, (metrics.load_mean, locality), xytext=(5, 5), textcoords="offset points")
    axes.set_xlabel("load of the busiest GPU / mean (mean over layers, 1 is even)")
    axes.set_ylabel("pair locality (share of transitions that stay on a GPU)")
    axes.set_title("Locality against balance on held-out tokens")
    axes.margins(0.2)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ProblemError(f"cannot write the plot {path}: {error}; name a .png, .svg or .pdf file") from None
    finally:
        pyplot.close(figure)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines as they are, without markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
