"""Pictures of comparisons: locality against balance, and step time by batch size.

Every plan has a colour (that colour-blind readers tell apart as well) and a marker of its own, both named in one legend
beside the panels: labels at points would overlap where plans are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.atomic import write_atomically
from placement.comparison import ComparedPlan
from placement.errors import ProblemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_SUFFIXES = (".png", ".svg", ".pdf")
#: Source: M. Okabe, K. Ito, Color Universal Design (2002); without yellow, which is hard to see on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = "os^vDPX<>*h"  # as many as have no common divisor with the number of colours
LINESTYLES = ("-", "--", ":")  # change where colours start again
#: Plans beyond this one in a legend start a new column.
LEGEND_ROWS = 3


def check_plot(path: Path) -> None:
    """Refuse a plot whose suffix names no image format, before long work.

    Raises:
        ProblemError: the suffix is another than those of ``PLOT_SUFFIXES``.
    """
    if path.suffix not in PLOT_SUFFIXES:
        raise ProblemError(f"plot {path}: expected a file name that ends in {', '.join(PLOT_SUFFIXES)}")


def plot_comparison(path: Path, rows: Sequence[ComparedPlan]) -> None:
    """Two panels for each kind of held-out tokens, written as an image; plans without metrics are left out.

    Args:
        path: the image; its suffix says the format.
        rows: of ``compare_strategies``.

    Raises:
        InputError: it cannot be written, or there is no plan with metrics.
    """
    judged = [row for row in rows if row.metrics is not None]
    if not judged:
        raise ProblemError(f"plot {path}: no strategy found a plan, there is nothing to draw; name more strategies")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = [list(block) for _, block in groupby(judged, key=lambda row: row.split.held_out)]
    names = list(dict.fromkeys(row.name for row in judged))
    styles = {name: _style(index) for index, name in enumerate(names)}
    figure, panels = pyplot.subplots(
        len(blocks), 2, figsize=(11, 4.2 * len(blocks) + 0.8), layout="constrained", squeeze=False
    )
    for (left, right), block in zip(panels, blocks, strict=True):
        _plot_locality(left, block, styles)
        _plot_times(right, block, styles)
    handles = {handle.get_label(): handle for axes in panels[:, 1] for handle in axes.get_lines()}
    columns = -(-len(names) // LEGEND_ROWS)
    figure.legend(handles=[handles[_label(name)] for name in names], loc="outside lower center", ncols=columns)
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=110)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())


def _style(index: int) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    marker = MARKERS[index % len(MARKERS)]
    dashes = LINESTYLES[index // len(COLOURS) % len(LINESTYLES)]
    look = {"color": colour, "marker": marker, "linestyle": dashes}
    return look | {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.6}


def _label(name: str) -> str:
    """A plan's name as matplotlib shows it: dollars would start formulas, and a first underscore hides a label."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _plot_locality(axes: Axes, rows: Sequence[ComparedPlan], styles: dict[str, dict[str, Any]]) -> None:
    """One point per plan, with the intervals of both figures as bars; at the largest batch size."""
    for row in rows:
        assert row.metrics is not None
        size = max(row.metrics.by_batch_size)
        point = row.metrics.load_mean, row.metrics.by_batch_size[size].pair_locality
        intervals = row.uncertainty[size].intervals
        bars = []
        for value, name in zip(point, ("load_mean", "pair_locality"), strict=True):
            interval = intervals[name]
            ends = (value, value) if interval is None else interval
            bars.append([[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]])
        axes.errorbar(*point, xerr=bars[0], yerr=bars[1], elinewidth=1, **styles[row.name])
    axes.set_xlabel("load of the busiest GPU / mean (mean over layers, 1 is even)")
    axes.set_ylabel("pair locality (share of transitions\nthat stay on a GPU)")
    axes.set_title(f"Locality against balance, held-out {rows[0].split.held_out}")
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=0.3)
    axes.margins(0.08)


def _plot_times(axes: Axes, rows: Sequence[ComparedPlan], styles: dict[str, dict[str, Any]]) -> None:
    """One line per plan over batch sizes: its step time relative to the plan ``contiguous``, else to the first plan."""
    base = next((row for row in rows if row.name == "contiguous"), rows[0])
    assert base.metrics is not None
    sizes = sorted(base.metrics.by_batch_size)
    for row in rows:
        assert row.metrics is not None
        times = [row.metrics.by_batch_size[size].step_us / base.metrics.by_batch_size[size].step_us for size in sizes]
        axes.plot(range(len(sizes)), times, label=_label(row.name), linewidth=1.2, **styles[row.name])
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("tokens per step")
    axes.set_ylabel(f"predicted step time / that of {_label(base.name)}")
    axes.set_title(f"Predicted step time, held-out {rows[0].split.held_out}")
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    axes.margins(0.08)
