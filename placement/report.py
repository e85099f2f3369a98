"""What the command line shows: tables and a plot of judged plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from placement.atomic import write_atomically
from placement.errors import ProblemError
from placement.metrics import Metrics
from placement.problem import Objective, Solution

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
#: Points closer than this share of the plot's range, in both directions, count as one.
COINCIDE = 0.02

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
        placement.add_row(escape(name), *figures, f"{last.gpus_per_token:.2f}")
        steps.add_row(escape(name), *(f"{m.active_ratio:.3f}" for m in by_size), *(f"{m.step_us:.0f}" for m in by_size))
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


def check_plot(path: Path) -> None:
    """Refuse a plot whose suffix names no image format, before long work.

    Raises:
        ProblemError: the suffix is another than those of ``PLOT_SUFFIXES``.
    """
    if path.suffix not in PLOT_SUFFIXES:
        raise ProblemError(f"plot {path}: expected a file name that ends in {', '.join(PLOT_SUFFIXES)}")


def plot_comparison(path: Path, rows: Mapping[str, Metrics]) -> None:
    """Locality against balance, one point per plan, written as an image.

    Raises:
        InputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    points = {name: (m.load_mean, list(m.by_batch_size.values())[-1].pair_locality) for name, m in rows.items()}
    for point in points.values():
        axes.scatter(*point)
    middle = (min(x for x, _ in points.values()) + max(x for x, _ in points.values())) / 2
    for label, point in merge_labels(points):  # written towards the middle, so that long ones stay inside
        right = point[0] > middle
        place = {"xytext": (-5 if right else 5, 5), "ha": "right" if right else "left"}
        axes.annotate(label, point, textcoords="offset points", **place)
    axes.set_xlabel("load of the busiest GPU / mean (mean over layers, 1 is even)")
    axes.set_ylabel("pair locality (share of transitions that stay on a GPU)")
    axes.set_title("Locality against balance on held-out tokens")
    axes.margins(0.2)
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    pyplot.close(figure)
    write_atomically(path, image.getvalue())


def merge_labels(points: Mapping[str, tuple[float, float]]) -> list[tuple[str, tuple[float, float]]]:
    """One label per place: plans that stand (almost) on one point share a label, ``a = b``, or they would overlap."""
    xs, ys = zip(*points.values(), strict=True)
    near_x, near_y = (COINCIDE * (max(values) - min(values)) for values in (xs, ys))
    merged: list[tuple[str, tuple[float, float]]] = []
    for name, (x, y) in points.items():
        for index, (label, (at_x, at_y)) in enumerate(merged):
            if abs(x - at_x) <= near_x and abs(y - at_y) <= near_y:
                merged[index] = (f"{label} = {name}", (at_x, at_y))
                break
        else:
            merged.append((name, (x, y)))
    return merged


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print lines as they are, without markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
