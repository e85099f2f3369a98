"""The plots of docs/placement.md, drawn from the files of results."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks.marked_tables import load
from benchmarks.placement_figures.common import CHECKOUT, RESULTS, Row
from placement.atomic import write_atomically

DOCS = CHECKOUT / "docs"
WIDTH, HEIGHT, DOTS_PER_INCH = 9.0, 3.8, 130
OURS, OTHERS = "tab:blue", "tab:gray"
MARKERS = ("s", "v", "P", "X", "D", "^", "*")
#: Which cases of the step times are drawn.
DRAWN_CLUSTERS, DRAWN_EXTRA = ("4 H200", "8 H200"), 25
EXCHANGE_COLOURS = {"allreduce": "tab:blue", "alltoall": "tab:orange", "coherent": "tab:green"}


def write_plots() -> None:
    """Draw every plot whose group was measured."""
    for name, (group, draw) in PLOTS.items():
        document = load(RESULTS / f"placement_{group}.json")
        if document is not None:
            content = io.BytesIO()
            draw(document["rows"]).savefig(content, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
            write_atomically(DOCS / f"placement-{name}.png", content.getvalue())


def draw_locality(rows: list[Row]) -> Figure:
    """Pair locality against balance on unseen sequences, one copy each."""
    figure, axes = _panels(2)
    for axis, num_gpus in zip(axes, (4, 8), strict=True):
        points = [row for row in rows if row["metric"] == "compared" and row["gpus"] == num_gpus]
        points = [row for row in points if "pair_locality" in row]
        curve = sorted((row for row in points if row["plan"].startswith("locality")), key=lambda row: row["load_mean"])
        axis.plot(
            [r["load_mean"] for r in curve], [r["pair_locality"] for r in curve], "o-", color=OURS, label="locality"
        )
        for number, row in enumerate(curve):
            name = "unbounded" if row["max_load"] is None else f"≤ {row['max_load']:g}"
            place = (row["load_mean"], row["pair_locality"])
            # Neighbours stand close: every other label goes below its point.
            offset, side = ((5, -9), "left") if number % 2 and row is not curve[-1] else ((-4, 5), "right")
            axis.annotate(name, place, offset, textcoords="offset points", fontsize=7, ha=side)
        others = [row for row in points if not row["plan"].startswith("locality")]
        for row, marker in zip(others, MARKERS, strict=False):
            colour = OURS if row["strategy"] == "ilp" else OTHERS
            axis.plot(row["load_mean"], row["pair_locality"], marker, color=colour, label=row["plan"])
        axis.set(title=f"{num_gpus} GPUs", xlabel="busiest GPU / mean (load_mean)", ylabel="pair locality")
        axis.margins(x=0.2, y=0.1)
    axes[-1].legend(fontsize=7)
    return figure


def draw_step_time(rows: list[Row]) -> Figure:
    """Step time of every plan relative to the ``step_time`` plan's, by batch size."""
    figure, axes = _panels(len(DRAWN_CLUSTERS))
    for axis, cluster in zip(axes, DRAWN_CLUSTERS, strict=True):
        for exchange, colour in EXCHANGE_COLOURS.items():
            chosen = [
                row
                for row in rows
                if (row["cluster"], row["extra_percent"], row["exchange"]) == (cluster, DRAWN_EXTRA, exchange)
                and row["tokens"] == "unseen"
                and row["phase"] == "decode"
            ]
            chosen.sort(key=lambda row: row["batch"])
            for plan, style in (("eplb", "-"), ("contiguous", "--"), (None, ":")):
                times = [row[f"{plan or row['best_other']}_us"] / row["step_time_us"] for row in chosen]
                label = f"{plan or 'best other'}, {exchange}"
                axis.plot([row["batch"] for row in chosen], times, style, color=colour, label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axis.set(title=f"{cluster}, +{DRAWN_EXTRA}% slots", xlabel="tokens per step", ylabel="step time / step_time's")
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def draw_active(rows: list[Row]) -> Figure:
    """Active ratio against extra slots."""
    figure, axes = _panels(2)
    for axis, num_gpus in zip(axes, (4, 8), strict=True):
        for batch, colour in ((1, "tab:blue"), (4, "tab:orange"), (8, "tab:green")):
            chosen = [
                row
                for row in rows
                if (row["metric"], row["tokens"], row["gpus"], row["batch"])
                == ("active_ratio", "unseen", num_gpus, batch)
            ]
            chosen.sort(key=lambda row: row["extra_percent"])
            extra = [row["extra_percent"] for row in chosen]
            axis.plot(extra, [row["value"] for row in chosen], "o-", color=colour, label=f"step_time, B={batch}")
            axis.plot(extra, [row["eplb"] for row in chosen], "s--", color=colour, label=f"EPLB's copies, B={batch}")
        axis.set(title=f"{num_gpus} GPUs", xlabel="extra slots in %", ylabel="active ratio (1 is even)")
    axes[-1].legend(fontsize=7)
    return figure


def _panels(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    return figure, figure.subplots(1, count)


#: Plot → group and the function that draws it.
PLOTS: dict[str, tuple[str, Callable[[list[Row]], Figure]]] = {
    "locality": ("locality", draw_locality),
    "step-time": ("step_time", draw_step_time),
    "active": ("active", draw_active),
}
