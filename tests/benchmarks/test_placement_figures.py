"""The tables of docs/placement.md are those of the files of results; targets are judged as stated."""

from __future__ import annotations

import json

import pytest

from benchmarks.marked_tables import MISSING, SECTION, fill
from benchmarks.placement_figures.common import RESULTS, reach
from benchmarks.placement_figures.document import DOCUMENT, TABLES


def test_the_document_shows_the_files_of_results():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert fill(text, RESULTS, TABLES) == text, "run python -m benchmarks.placement_figures --document"


def test_every_table_has_a_section():
    names = [match[2] for match in SECTION.finditer(DOCUMENT.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(TABLES)


def test_a_section_is_replaced_and_the_text_around_it_kept(tmp_path):
    row = {"figure": "locality, seconds", **reach(0.5, "<", 2.0)}
    document = {"command": "python", "commit": "c" * 40, "device": "CPU", "versions": {"numpy": "2"}, "rows": [row]}
    (tmp_path / "placement_scale.json").write_text(json.dumps(document))
    marked = "before\n<!-- figures: scale -->\n{}<!-- end of figures -->\nafter\n"
    filled = fill(marked.format("an old table\n"), tmp_path, TABLES)
    assert "| locality, seconds | < 2 | 0.5 | yes |" in filled
    assert "an old table" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("-->\nafter\n")
    assert fill(filled, tmp_path, TABLES) == filled
    (tmp_path / "placement_scale.json").unlink()
    assert fill(filled, tmp_path, TABLES) == marked.format(MISSING)


@pytest.mark.parametrize(
    ("value", "relation", "target", "ok"),
    [
        (0.56, "≥", 0.56, True),
        (0.559, "≥", 0.56, False),
        (1.15 * (1 + 1e-12), "≤", 1.15, True),
        (1.16, "≤", 1.15, False),
        (1.0, "<", 1.0, False),
        (1.0 - 1e-6, "<", 1.0, True),
        (1.0, ">", 1.0, False),
    ],
)
def test_targets(value, relation, target, ok):
    assert reach(value, relation, target)["ok"] is ok
