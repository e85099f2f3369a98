"""SGLang's counts, ``stat`` and ``per_pass``: layers, copies, ranks and dumps."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.importers import IMPORTERS, ModelFacts, Remarks
from profiler.importers.recording import RecordedCounts, RecordingError
from tests.support.engine_recordings import count_routes, random_routes, slot_map, to_slots, write_passes, write_stat


def read(paths: list[Path], facts: ModelFacts, remarks: Remarks | None = None) -> RecordedCounts:
    recording = IMPORTERS["sglang"](paths, facts, remarks or Remarks())
    assert isinstance(recording, RecordedCounts)
    return recording


def moe_counts(num_layers: int = 5, num_experts: int = 8, layer_ids: tuple[int, ...] = (1, 2, 4)) -> np.ndarray:
    """Four steps of a ring buffer of six, ``[6, R, E]``."""
    counts = np.zeros((6, num_layers, num_experts), int)
    counts[:4, list(layer_ids)] = np.random.default_rng(1).integers(1, 50, (4, len(layer_ids), num_experts))
    return counts


@pytest.mark.parametrize("layer_ids", [None, (1, 2, 4)])
def test_stat_keeps_the_layers_that_are_moe(tmp_path: Path, layer_ids: tuple[int, ...] | None) -> None:
    counts = moe_counts()
    recording = read([write_stat(tmp_path / "a.pt", counts)], ModelFacts("m", 8, layer_ids=layer_ids))
    assert recording.layer_ids == (1, 2, 4)
    np.testing.assert_array_equal(recording.counts, counts.sum(axis=0)[[1, 2, 4]])


def test_dumps_add_and_the_same_dump_counts_once(tmp_path: Path) -> None:
    first, second = moe_counts(), moe_counts() * 3
    paths = [write_stat(tmp_path / f"{name}.pt", c) for name, c in (("a", first), ("b", second), ("copy", first))]
    remarks = Remarks()
    recording = read(paths, ModelFacts("m"), remarks)
    np.testing.assert_array_equal(recording.counts, (first + second).sum(axis=0)[[1, 2, 4]])
    assert "files left out, equal to another rank's: 1" in remarks.lines()


@given(
    num_experts=st.integers(1, 6),
    num_copies=st.integers(0, 4),
    tokens_by_rank=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_passes_map_slots_to_experts_and_ranks_add(
    num_experts: int, num_copies: int, tokens_by_rank: list[int], seed: int
) -> None:
    layer_ids, num_layers = (1, 3), 4
    map_RP = slot_map(num_layers, num_experts, num_copies, seed)
    expected = np.zeros((2, num_experts), int)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for rank, num_tokens in enumerate(tokens_by_rank):
            routes = random_routes(num_tokens, 2, num_experts, min(2, num_experts), seed + rank)
            slots = to_slots(routes, map_RP, layer_ids, seed)
            physical = np.zeros((2, num_layers, map_RP.shape[1]), int)
            physical[0][list(layer_ids)] = count_routes(slots, map_RP.shape[1])
            physical[1, 1, 0] = physical[1, 3, 0] = rank + 1  # makes the ranks differ, as their tokens do
            for row, layer in enumerate(layer_ids):
                expected[row, map_RP[layer, 0]] += rank + 1
            expected += count_routes(routes, num_experts)
            paths.append(write_passes(Path(folder) / f"{rank}.pt", physical, map_RP, rank))
        recording = read(paths, ModelFacts("m", num_experts, layer_ids=layer_ids))
    np.testing.assert_array_equal(recording.counts, expected)


def test_ranks_that_saw_the_same_tokens_count_once(tmp_path: Path) -> None:
    map_RP = slot_map(3, 4, 2)
    physical = np.random.default_rng(0).integers(1, 9, (2, 3, 6))
    views = [write_passes(tmp_path / f"{rank}.pt", physical, map_RP, rank) for rank in range(2)]
    idle = write_passes(tmp_path / "idle.pt", physical[:0], map_RP, 2)
    later = write_passes(tmp_path / "later.pt", physical, map_RP, 0, start=2)
    once = read(views[:1], ModelFacts("m")).counts
    np.testing.assert_array_equal(read([idle, *views], ModelFacts("m")).counts, once)
    np.testing.assert_array_equal(read([*views, later], ModelFacts("m")).counts, 2 * once)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ModelFacts("other", 16), "num_experts is 8, other has 16"),
        (ModelFacts("other", layer_ids=(1, 2)), "row 4 holds routes, but layer 4 of other is not MoE"),
        (ModelFacts("other", layer_ids=(1, 2, 3, 4)), "nothing of MoE layer 3"),
        (ModelFacts("other", layer_ids=(1, 2, 4, 9)), "has 5 rows of layers, other has 4 MoE layers up to layer 9"),
        (ModelFacts("other", layer_ids=(3, 4, 5, 6, 7)), "has 5 rows"),
        (ModelFacts("other", layer_ids=(1, 2, 4), num_layers=6), "has 5 rows"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, facts: ModelFacts, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        read([write_stat(tmp_path / "a.pt", moe_counts())], facts)


def test_two_kinds_or_two_models_are_refused(tmp_path: Path) -> None:
    stat = write_stat(tmp_path / "a.pt", moe_counts())
    passes = write_passes(tmp_path / "b.pt", np.ones((1, 5, 8), int), slot_map(5, 8, 0))
    larger = write_stat(tmp_path / "c.pt", moe_counts(num_experts=9))
    with pytest.raises(RecordingError, match="per_pass"):
        read([stat, passes], ModelFacts("m"))
    with pytest.raises(RecordingError, match="one model"):
        read([stat, larger], ModelFacts("m"))
    with pytest.raises(RecordingError, match="one by one"):
        read([stat, tmp_path / "d.jsonl"], ModelFacts("m"))
