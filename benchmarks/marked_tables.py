"""Tables in documents, between marks, written from the files of results so that no number can drift."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SECTION = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
MISSING = "Not measured yet.\n"
Row = dict[str, Any]
#: Section → file of results (without suffix) and the function that writes its table from the rows.
Tables = Mapping[str, tuple[str, Callable[[list[Row]], str]]]


def fill(text: str, results: Path, tables: Tables) -> str:
    """The text with every section between its marks replaced by the table of its name, and where its figures are from.

    Args:
        text: with sections marked ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
        results: folder of the files of results.
        tables: by name.

    Raises:
        KeyError: a section has a name that there is no table of.
    """
    return SECTION.sub(lambda match: match[1] + _section(match[2], results, tables) + match[3], text)


def load(path: Path) -> dict[str, Any] | None:
    """A file of results, None where it was not measured."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def only(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """The rows that have all these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _section(name: str, results: Path, tables: Tables) -> str:
    file, render = tables[name]
    document = load(results / f"{file}.json")
    if document is None:
        return MISSING
    versions = ", ".join(f"{package} {version}" for package, version in document["versions"].items())
    commit = (document["commit"] or "unknown")[:12]
    source = f"`{document['command']}`, commit {commit}, {document['device']}; {versions}"
    return f"{render(document['rows'])}\nSource: `benchmarks/results/{file}.json` ({source}).\n"
