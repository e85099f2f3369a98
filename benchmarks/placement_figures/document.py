"""The tables of docs/placement.md, written from the files of results so that no number can drift."""

from __future__ import annotations

from benchmarks.marked_tables import Row, Tables, fill, markdown_table, only
from benchmarks.placement_figures.common import CHECKOUT, RESULTS
from placement.atomic import write_atomically

DOCUMENT = CHECKOUT / "docs" / "placement.md"
YES, NO = "yes", "**no**"


def write_document() -> None:
    """Fill every marked section of docs/placement.md."""
    write_atomically(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8"), RESULTS, TABLES))


def _ok(row: Row) -> str:
    return YES if row["ok"] else NO


def _locality(rows: list[Row]) -> str:
    lines = []
    for case in only(rows, plan="one copy", metric="locality", tokens="unseen"):
        same = {key: case[key] for key in ("pairs", "gpus", "max_load")}
        (solved,) = only(rows, **same, plan="one copy", metric="locality", tokens="solved")
        (load_max,) = only(rows, **same, plan="one copy", metric="load_max")
        seen = only(rows, **same, metric="locality_seen")
        copies = [
            only(rows, **same, plan=f"copies for {rule}", judged_rule=by, tokens="unseen", batch=8)[0]
            for rule, by in (("level", "level"), ("nearest", "nearest"), ("nearest", "level"))
        ]
        name = case["figure"].removesuffix(", unseen")
        proof = f"{solved['bound']:.3f} ({100 * solved['gap']:.0f}%)"
        line = [name, f"{case['target']:g}", f"{case['value']:.4f}", _ok(case), f"{solved['value']:.4f}", proof]
        line += [f"{seen[0]['value']:.4f}" if seen else "", f"{load_max['value']:.3f}"]
        lines.append([*line, *(f"{row['value']:.4f}" for row in copies)])
    head = [
        "what",
        "reach",
        "unseen",
        "ok",
        "solved half",
        "its bound (gap)",
        "solved on unseen",
        "load_max, solved half",
    ]
    return markdown_table([*head, "+25% level", "+25% nearest", "the same judged by level"], lines)


def _compared(rows: list[Row]) -> str:
    lines = []
    for row in only(rows, metric="compared"):
        figures = ["no plan"] + [""] * 4
        if "pair_locality" in row:
            names = ("pair_locality", "top1_locality", "load_mean", "load_max")
            figures = [*(f"{row[name]:.3f}" for name in names), f"{row['seconds']:.1f}"]
        lines.append([str(row["gpus"]), row["plan"], *figures])
    head = ["GPUs", "placement", "pair locality", "top-1 locality", "load_mean", "load_max", "solved in s"]
    return markdown_table(head, lines)


def _balance(rows: list[Row]) -> str:
    lines = []
    for counted in only(rows, metric="load_mean_splits"):
        cell = {key: counted[key] for key in ("gpus", "extra_percent")}
        (most,) = only(rows, **cell, metric="load_max_splits")
        line = [f"{cell['gpus']}", f"{cell['extra_percent']}%"]
        for tokens in ("solved", "unseen"):
            for metric in ("load_mean", "load_max"):
                (row,) = only(rows, **cell, metric=metric, tokens=tokens, split="even→odd")
                line.append(f"{row['value']:.4f} / {row['eplb']:.4f}{'' if row['ok'] else ' ' + NO}")
                if "bound" in row:
                    line.append(f"{row['bound']:.4f}")
        line += [f"{row['value']} of {row['splits']} ({row['worst_ratio']:.3f})" for row in (counted, most)]
        lines.append(line)
    head = ["GPUs", "extra", "mean, solved", "bound", "max, solved", "mean, unseen", "max, unseen"]
    known = only(rows, metric="busiest")[0]
    (proof,) = only(rows, metric="gap")
    note = (
        f"\nLoads 600, 560, 120, 120, 20, 10, 10, 10 on 8 GPUs of 2 slots: busiest GPU {known['value']:.2f}, EPLB "
        f"{known['eplb']:.2f}; {'proven optimal' if proof['ok'] else 'not proven'}.\n"
    )
    return markdown_table([*head, "splits within 0.5%, mean (worst ratio)", "the same, max"], lines) + note


def _active(rows: list[Row]) -> str:
    lines = []
    for row in only(rows, metric="active_ratio", tokens="unseen"):
        target, ok = (f"{row['target']:g}", _ok(row)) if "target" in row else ("", "")
        figures = [f"{row[name]:.3f}" for name in ("value", "eplb", "contiguous")]
        lines.append([str(row["gpus"]), f"{row['extra_percent']}%", str(row["batch"]), target, *figures, ok])
    return markdown_table(["GPUs", "extra", "B", "reach", "step_time", "EPLB's copies", "contiguous", "ok"], lines)


def _step_time(rows: list[Row]) -> str:
    lines = []
    solved = only(rows, metric="step_us", tokens="solved", batch=None)
    for case in solved:
        same = {key: case[key] for key in ("cluster", "extra_percent", "exchange", "phase")}
        judged = only(rows, **same, tokens="unseen")
        for row in judged:
            gain = f"{row['value']:.2f}%"
            interval = f"{row['saved_us_low']:.1f} to {row['saved_us_high']:.1f}"
            line = [case["cluster"], f"{case['extra_percent']}%", case["exchange"], str(row["batch"])]
            line += [f"{row['step_time_us']:.1f}", f"{row[row['best_other'] + '_us']:.1f}", row["best_other"]]
            lines.append([*line, gain, interval, _ok(row)])
    head = [
        "cluster",
        "extra",
        "exchange",
        "B",
        "step_time, µs",
        "best other, µs",
        "which",
        "gain",
        "µs saved, 95%",
        "ok",
    ]
    return markdown_table(head, lines)


def _scale(rows: list[Row]) -> str:
    lines = [
        [row["figure"], f"{row['relation']} {row['target']:.5g}", f"{row['value']:.5g}", _ok(row)]
        for row in rows
        if row.get("target") is not None
    ]
    return markdown_table(["what", "reach", "got", "ok"], lines)


TABLES: Tables = {
    "locality": ("placement_locality", _locality),
    "compared": ("placement_locality", _compared),
    "balance": ("placement_balance", _balance),
    "active": ("placement_active", _active),
    "step_time": ("placement_step_time", _step_time),
    "scale": ("placement_scale", _scale),
}
