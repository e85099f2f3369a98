"""The tables of docs/profiling.md are those of the files of results; a profile's figures are those of its fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.marked_tables import MISSING, SECTION, fill
from benchmarks.placement_generators import SyntheticRouting
from benchmarks.profiler_figures import DOCUMENT, RESULTS, TABLES, figures
from benchmarks.profiler_statistics import measure, write_long_trace
from profiler.profile_builder import profile_trace
from profiler.trace_format import RoutingTrace
from tests.support.traces import random_sequences, write_trace


def test_the_document_shows_the_files_of_results() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert fill(text, RESULTS, TABLES) == text, "run python -m benchmarks.profiler_figures --document"
    assert sorted(match[2] for match in SECTION.finditer(text)) == sorted(TABLES)
    assert MISSING not in text


def test_figures_of_a_trace_without_domains_or_second_layer(tmp_path: Path) -> None:
    with RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([30] * 9, num_layers=1))) as trace:
        found = figures(profile_trace(trace))
    assert found["tokens"] == 270
    assert found["active experts of a layer, 1 tokens"] == pytest.approx(2.0)
    assert found["choices moved, mean domain"] is None
    assert found["choices moved, mean window of time"] is not None
    assert not any(name.startswith("pairs kept") for name in found)


def test_a_long_trace_is_written_and_measured(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    write_long_trace(path, SyntheticRouting(num_layers=3, num_experts=8, top_k=2, num_tokens=100), 1_200)
    with RoutingTrace.open(path) as trace:
        assert (trace.num_tokens, trace.num_sequences) == (1_200, 3)
    measured = measure(path, tmp_path / "statistics.json")
    assert measured["seconds"] > 0
    assert 0.01 < measured["peak_rss_gib"] < 4
