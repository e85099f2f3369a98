"""The tables of docs/placement.md, written from the files of results so that no number can drift."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.placement_figures.common import CHECKOUT, RESULTS, Row
from placement.atomic import write_atomically

DOCUMENT = CHECKOUT / "docs" / "placement.md"
SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
MISSING = "Not measured yet.\n"
YES, NO = "yes", "**no**"
Document = dict[str, Any]


def write_document() -> None:
    """Fill every marked section of docs/placement.md."""
    write_atomically(DOCUMENT, fill(DOCUMENT.read_text(encoding="utf-8"), RESULTS))


def fill(text: str, results: Path) -> str:
    """The text with every section between its marks replaced by the table of its name.

    Args:
        text: with sections marked ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
        results: folder of placement_GROUP.json.

    Raises:
        KeyError: a section has a name that there is no table of.
    """
    return SECTION.sub(lambda match: match[1] + _section(match[2], results) + match[3], text)


def load(group: str, results: Path = RESULTS) -> Document | None:
    """A group's file of results, None where it was not measured."""
    path = results / f"placement_{group}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _section(name: str, results: Path) -> str:
    group, render = TABLES[name]
    document = load(group, results)
    if document is None:
        return MISSING
    versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
    commit = (document["commit"] or "unknown")[:12]
    source = f"`{document['command']}`, commit {commit}, {document['device']}; {versions}"
    return f"{render(document['rows'])}\nSource: `benchmarks/results/placement_{group}.json` ({source}).\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _only(rows: Iterable[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _ok(row: Row) -> str:
    return YES if row["ok"] else NO


def _locality(rows: list[Row]) -> str:
    lines = []
    for case in _only(rows, plan="one copy", metric="locality", tokens="unseen"):
        same = {key: case[key] for key in ("pairs", "gpus", "max_load")}
        (solved,) = _only(rows, **same, plan="one copy", metric="locality", tokens="solved")
        (load_max,) = _only(rows, **same, plan="one copy", metric="load_max")
        seen = _only(rows, **same, metric="locality_seen")
        copies = [
            _only(rows, **same, plan=f"copies for {rule}", judged_rule=by, tokens="unseen", batch=8)[0]
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
    return _table([*head, "+25% level", "+25% nearest", "the same judged by level"], lines)


def _compared(rows: list[Row]) -> str:
    lines = []
    for row in _only(rows, metric="compared"):
        figures = ["no plan"] + [""] * 4
        if "pair_locality" in row:
            names = ("pair_locality", "top1_locality", "load_mean", "load_max")
            figures = [*(f"{row[name]:.3f}" for name in names), f"{row['seconds']:.1f}"]
        lines.append([str(row["gpus"]), row["plan"], *figures])
    head = ["GPUs", "placement", "pair locality", "top-1 locality", "load_mean", "load_max", "solved in s"]
    return _table(head, lines)


def _balance(rows: list[Row]) -> str:
    lines = []
    for counted in _only(rows, metric="load_mean_splits"):
        cell = {key: counted[key] for key in ("gpus", "extra_percent")}
        (most,) = _only(rows, **cell, metric="load_max_splits")
        line = [f"{cell['gpus']}", f"{cell['extra_percent']}%"]
        for tokens in ("solved", "unseen"):
            for metric in ("load_mean", "load_max"):
                (row,) = _only(rows, **cell, metric=metric, tokens=tokens, split="even→odd")
                line.append(f"{row['value']:.4f} / {row['eplb']:.4f}{'' if row['ok'] else ' ' + NO}")
                if "bound" in row:
                    line.append(f"{row['bound']:.4f}")
        line += [f"{row['value']} of {row['splits']} ({row['worst_ratio']:.3f})" for row in (counted, most)]
        lines.append(line)
    head = ["GPUs", "extra", "mean, solved", "bound", "max, solved", "mean, unseen", "max, unseen"]
    known = _only(rows, metric="busiest")[0]
    (proof,) = _only(rows, metric="gap")
    note = (
        f"\nLoads 600, 560, 120, 120, 20, 10, 10, 10 on 8 GPUs of 2 slots: busiest GPU {known['value']:.2f}, EPLB "
        f"{known['eplb']:.2f}; {'proven optimal' if proof['ok'] else 'not proven'}.\n"
    )
    return _table([*head, "splits within 0.5%, mean (worst ratio)", "the same, max"], lines) + note


def _active(rows: list[Row]) -> str:
    lines = []
    for row in _only(rows, metric="active_ratio", tokens="unseen"):
        target, ok = (f"{row['target']:g}", _ok(row)) if "target" in row else ("", "")
        figures = [f"{row[name]:.3f}" for name in ("value", "eplb", "contiguous")]
        lines.append([str(row["gpus"]), f"{row['extra_percent']}%", str(row["batch"]), target, *figures, ok])
    return _table(["GPUs", "extra", "B", "reach", "step_time", "EPLB's copies", "contiguous", "ok"], lines)


def _step_time(rows: list[Row]) -> str:
    lines = []
    solved = _only(rows, metric="step_us", tokens="solved", batch=None)
    for case in solved:
        same = {key: case[key] for key in ("cluster", "extra_percent", "exchange", "phase")}
        judged = _only(rows, **same, tokens="unseen")
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
    return _table(head, lines)


def _scale(rows: list[Row]) -> str:
    lines = [
        [row["figure"], f"{row['relation']} {row['target']:.5g}", f"{row['value']:.5g}", _ok(row)]
        for row in rows
        if row.get("target") is not None
    ]
    return _table(["what", "reach", "got", "ok"], lines)


#: Section → group and the function that writes its table.
TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "locality": ("locality", _locality),
    "compared": ("locality", _compared),
    "balance": ("balance", _balance),
    "active": ("active", _active),
    "step_time": ("step_time", _step_time),
    "scale": ("scale", _scale),
}
