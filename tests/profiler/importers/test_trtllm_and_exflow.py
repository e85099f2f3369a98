"""TensorRT-LLM's directories of statistics, and ExFlow's arrays."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from profiler.importers import IMPORTERS, ModelFacts, Remarks, exflow
from profiler.importers.recording import RecordedCounts, RecordedSequence, RecordingError
from tests.support.engine_recordings import random_routes, write_statistics

FACTS = ModelFacts("m", 8, 2, (1, 2, 4), 5)


def rank_counts(rank: int, layers: tuple[int, ...] = (1, 2, 4)) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(rank)
    return {f"{step}_{layer}": generator.integers(1, 50, 8) for step in (100, 101) for layer in layers}


def read(folder: Path, facts: ModelFacts = FACTS, remarks: Remarks | None = None) -> RecordedCounts:
    recording = IMPORTERS["trtllm"]([folder], facts, remarks or Remarks())
    assert isinstance(recording, RecordedCounts)
    return recording


@pytest.mark.parametrize("facts", [FACTS, ModelFacts("m")])
@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_ranks_and_iterations_add_and_keys_name_the_layers(tmp_path: Path, facts: ModelFacts, dtype: str) -> None:
    ranks = [rank_counts(0), rank_counts(1), rank_counts(0)]  # the third saw the first one's tokens
    remarks = Remarks()
    recording = read(write_statistics(tmp_path / "s", ranks, 8, 2, dtype), facts, remarks)
    expected = [sum(rank[f"{step}_{layer}"] for rank in ranks[:2] for step in (100, 101)) for layer in (1, 2, 4)]
    assert recording.layer_ids == (1, 2, 4)
    np.testing.assert_array_equal(recording.counts, expected)
    assert remarks.lines() == ["files left out, equal to another rank's: 1"]


def test_pipeline_ranks_have_their_own_layers_and_a_draft_is_left_out(tmp_path: Path) -> None:
    folder = write_statistics(tmp_path / "s", [rank_counts(0, (1,)), rank_counts(1, (2, 4, 5))], 8, 2)
    remarks = Remarks()
    assert read(folder, FACTS, remarks).layer_ids == (1, 2, 4)
    assert "layers beyond the model's last (a draft's) left out: 1" in remarks.lines()


def test_directories_add_and_must_be_of_one_model(tmp_path: Path) -> None:
    folders = [write_statistics(tmp_path / str(n), [rank_counts(n)], 8, 2) for n in range(2)]
    together = IMPORTERS["trtllm"](folders, ModelFacts("m"), Remarks())
    assert isinstance(together, RecordedCounts)
    np.testing.assert_array_equal(together.counts, read(folders[0]).counts + read(folders[1]).counts)
    other = write_statistics(tmp_path / "other", [{"1_1": np.ones(9)}], 9, 2)
    with pytest.raises(RecordingError, match="num_experts is 9, m has 8"):
        IMPORTERS["trtllm"]([*folders, other], ModelFacts("m"), Remarks())


def test_raw_ids_are_left_out_or_refused(tmp_path: Path) -> None:
    folder = write_statistics(tmp_path / "s", [rank_counts(0)], 8, 2)
    expected = read(folder).counts
    save_file({"100_1": np.zeros((5, 2), np.int32)}, folder / "rank0_raw.safetensors")
    remarks = Remarks()
    np.testing.assert_array_equal(read(folder, FACTS, remarks).counts, expected)
    assert any("neither requests nor prefill from decode" in line for line in remarks.lines())
    with pytest.raises(RecordingError, match="neither requests nor prefill"):
        read(folder / "rank0_raw.safetensors")
    (folder / "rank0.safetensors").unlink()
    with pytest.raises(RecordingError, match="no rank"):
        read(folder)


@pytest.mark.parametrize(
    ("counts", "facts", "message"),
    [
        (rank_counts(0), ModelFacts("other", 9), "num_experts is 8, other has 9"),
        (rank_counts(0), ModelFacts("other", 8, 4), "top_k is 2, other has 4"),
        (rank_counts(0), ModelFacts("other", 8, 2, (2, 4)), "counts of layer 1, which is not MoE"),
        (rank_counts(0), ModelFacts("other", 8, 2, (1, 2, 3, 4)), "nothing of MoE layer 3"),
        ({"100": np.ones(8)}, FACTS, "expected names such as 100_3"),
        ({"100_1": np.ones(7)}, FACTS, "expected I32 or I64"),
        ({"100_1": -np.ones(8)}, FACTS, "count -1"),
        ({}, FACTS, "holds no counts"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(
    tmp_path: Path, counts: dict[str, np.ndarray], facts: ModelFacts, message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        read(write_statistics(tmp_path / "s", [counts], 8, 2), facts)


def exflow_sequences(path: Path, facts: ModelFacts, tokens_per_sequence: int | None = None) -> list[RecordedSequence]:
    reader = partial(exflow.read, tokens_per_sequence=tokens_per_sequence)
    return list(reader([path], facts, Remarks()).sequences)


@pytest.mark.parametrize(("length", "expected"), [(None, [10]), (4, [4, 4, 2]), (10, [10]), (99, [10])])
def test_exflow_tokens_in_order(tmp_path: Path, length: int | None, expected: list[int]) -> None:
    routes = random_routes(10, 3, 8, 1)
    np.save(tmp_path / "t.npy", routes[:, :, 0].astype(np.int32))
    sequences = exflow_sequences(tmp_path / "t.npy", ModelFacts("m", 8, None, (1, 3, 5)), length)
    assert [sequence.position.tolist() for sequence in sequences] == [list(range(n)) for n in expected]
    np.testing.assert_array_equal(np.concatenate([sequence.experts for sequence in sequences]), routes)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ModelFacts("m", 4, 1, (0, 1, 2)), "expected 0 to 3"),
        (ModelFacts("m", 8, 1, (0, 1)), "has 3 rows of layers"),
        (ModelFacts("m", 8, 2, (0, 1, 2)), "top_k is 1, m has 2"),
        (ModelFacts("m", 8), "--layers"),
    ],
)
def test_exflow_of_another_model_is_refused(tmp_path: Path, facts: ModelFacts, message: str) -> None:
    np.save(tmp_path / "t.npy", np.array([[7, 6, 5], [1, 2, 3]]))
    with pytest.raises(RecordingError, match=message):
        exflow_sequences(tmp_path / "t.npy", facts)


@pytest.mark.parametrize("array", [np.zeros((3, 2)), np.zeros(4, int), np.zeros((0, 3), int), np.zeros((2, 2, 2), int)])
def test_exflow_arrays_of_other_shapes_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(RecordingError, match="expected integers"):
        exflow_sequences(tmp_path / "t.npy", ModelFacts("m", 8, 1, (0, 1)))


def test_an_exflow_placement_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Expert,Node\n0,0\n")
    with pytest.raises(RecordingError, match="a placement"):
        exflow_sequences(tmp_path / "p.csv", ModelFacts("m", 8, 1, (0, 1)))
