"""Merged traces hold every token once, in order, each in the half it was in before."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler import trace_format
from profiler.errors import InputError, TraceError
from profiler.trace_format import RoutingTrace
from profiler.trace_merge import merge_traces
from tests.support.trace_files import save_trace, token_records

SEQUENCES = st.dictionaries(st.integers(0, 12), st.integers(1, 5), min_size=1, max_size=5)


@given(traces=st.lists(st.tuples(SEQUENCES, st.booleans()), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_tokens_keep_order_half_and_domain(traces: list[tuple[dict[int, int], bool]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = []
        for seed, (sequences, named) in enumerate(traces):
            domains = [f"é{seed}-{sequence}" for sequence in range(14)] if named else None
            paths.append(save_trace(folder / f"{seed}", sequences, domains=domains, seed=seed))
        assert merge_traces(paths, folder / "merged") == []
        assert sorted(each.name for each in folder.iterdir()) == [*map(str, range(len(traces))), "merged"]
        assert token_records(folder / "merged") == [record for path in paths for record in token_records(path)]
        with RoutingTrace.open(folder / "merged") as merged:
            assert merged.num_sequences == sum(len(sequences) for sequences, _ in traces)
            assert (merged.domains is None) == (not any(named for _, named in traces))
            for parity in (0, 1):
                ids = {int(sequence) for sequence in merged.sequence() if sequence % 2 == parity}
                assert ids == set(range(parity, 2 * len(ids), 2))


def test_the_first_trace_keeps_its_ids(tmp_path: Path) -> None:
    first = save_trace(tmp_path / "a", {0: 2, 1: 1, 2: 1})
    second = save_trace(tmp_path / "b", {1: 1, 0: 2, 3: 1}, domains=["x", "y", "z", "w"])
    merge_traces([first, second], tmp_path / "merged")
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert merged.sequence().tolist() == [0, 0, 1, 2, 3, 4, 4, 5]
        assert merged.domains == ("", "", "", "y", "x", "w")


def test_a_merge_is_the_same_over_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_format, "TOKENS_PER_CHUNK", 3)
    paths = [save_trace(tmp_path / str(seed), {2: 7, 0: 50, 5: 1}, seed=seed) for seed in (0, 1)]
    merge_traces(paths, tmp_path / "merged")
    assert token_records(tmp_path / "merged") == [record for path in paths for record in token_records(path)]


def test_metadata_is_kept_where_the_traces_agree(tmp_path: Path) -> None:
    told = {"model_fingerprint": "f" * 64, "expert_bytes": "12", "origin": "lab", "source": "monday"}
    first = save_trace(tmp_path / "a", {0: 1}, metadata=told)
    second = save_trace(tmp_path / "b", {0: 1}, metadata={"source": "tuesday", "expert_bytes": "24"}, seed=1)
    third = save_trace(tmp_path / "c", {0: 1}, metadata={"source": "monday", "model": "Tiny"}, seed=2)
    notes = merge_traces([first, second, third], tmp_path / "merged")
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert merged.metadata.items() >= {"origin": "lab", "source": "monday; tuesday", "model": "tiny"}.items()
        assert (merged.model_fingerprint, merged.expert_bytes) == ("f" * 64, None)
    assert notes == [
        "expert_bytes is dropped: the traces differ in it (12, 24)",
        "the traces name the model tiny, Tiny; the first name is kept",
    ]


def test_optional_tensors_are_kept_if_every_trace_has_them(tmp_path: Path) -> None:
    first = save_trace(tmp_path / "a", {0: 2}, without=["token_ids"])
    second = save_trace(tmp_path / "b", {0: 1}, without=["token_ids", "weights"], seed=1)
    third = save_trace(tmp_path / "c", {0: 1}, seed=2)
    assert merge_traces([first, second, third], tmp_path / "merged") == [
        f"weights is dropped: 1 of 3 traces have none, as {second}",
        f"token_ids is dropped: 2 of 3 traces have none, as {first}",
    ]
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert not merged.has_weights
        assert not merged.has_token_ids


def test_tensors_that_the_format_gains_are_carried_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trace_format.TENSORS, "later", ("U8",))
    monkeypatch.setattr(trace_format, "OPTIONAL_TENSORS", (*trace_format.OPTIONAL_TENSORS, "later"))
    paths = [save_trace(tmp_path / str(n), {0: 2}, later=np.array([n, 7], np.uint8)) for n in range(2)]
    merge_traces(paths, tmp_path / "merged")
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert merged.column("later").tolist() == [0, 7, 1, 7]


def test_ids_of_different_width_are_joined(tmp_path: Path) -> None:
    wide = np.array([[[7, 1], [0, 2], [3, 4]]], np.uint16)
    paths = [save_trace(tmp_path / "a", {0: 1}), save_trace(tmp_path / "b", {0: 1}, experts=wide)]
    merge_traces(paths, tmp_path / "merged")
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert merged.experts().dtype == np.uint16
        np.testing.assert_array_equal(merged.experts(1), wide)


def test_many_traces_need_few_open_files(tmp_path: Path) -> None:
    paths = [save_trace(tmp_path / str(n), {n: 1}, seed=n) for n in range(60)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(100, limits[0]), limits[1]))
    try:
        merge_traces(paths, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with RoutingTrace.open(tmp_path / "merged") as merged:
        assert merged.sequence().tolist() == list(range(60))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_experts": 9}, "num_experts is 9, but 8 in "),
        ({"top_k": 3}, "top_k is 3, but 2 in "),
        ({"layer_ids": (1, 2, 6)}, "layer_ids is [1, 2, 6], but [1, 2, 5] in "),
        ({"metadata": {"model_fingerprint": "b" * 64}}, f"model_fingerprint is {'b' * 64}, but {'a' * 64} in "),
    ],
)
def test_traces_of_other_models_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    bare = save_trace(tmp_path / "bare", {0: 1})
    told = save_trace(tmp_path / "told", {0: 1}, metadata={"model_fingerprint": "a" * 64})
    wrong = save_trace(tmp_path / "wrong", {0: 1}, **other)
    with pytest.raises(TraceError) as caught:
        merge_traces([bare, told, wrong], tmp_path / "merged")
    assert f"{wrong}: {message}" in str(caught.value)
    assert "merge traces of one model only" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged_is_told(tmp_path: Path) -> None:
    first, second = (save_trace(tmp_path / name, {0: 1}) for name in "ab")
    before = first.read_bytes()
    broken = save_trace(tmp_path / "broken", {0: 1}, decode=np.array([3], np.uint8))
    for paths, output, message in (
        ([first], tmp_path / "m", "merge got 1 trace, expected two or more"),
        ([first, second, tmp_path / "x" / ".." / "a"], tmp_path / "m", "is named twice, and its tokens"),
        ([first, second], first, "is named twice, and would be overwritten"),
        ([first, second], tmp_path / "missing" / "m", "create it first"),
        ([first, tmp_path / "none"], tmp_path / "m", "none: cannot be read"),
        ([first, broken], tmp_path / "m", "decode is 3 at token 0"),
    ):
        with pytest.raises(InputError, match=message):
            merge_traces(paths, output)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "broken"]
    assert first.read_bytes() == before


def test_domains_that_fit_no_header_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.trace_copy.MAX_HEADER_BYTES", 5000)
    paths = [save_trace(tmp_path / name, {0: 1}, domains=["d" * 3000], metadata={"source": name}) for name in "ab"]
    with pytest.raises(TraceError, match="expected at most 5,000; write fewer sequences"):
        merge_traces(paths, tmp_path / "m")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b"]
