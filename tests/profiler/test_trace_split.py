"""Parts of a trace hold its tokens once each, in order, with its ids and metadata; samples are repeatable."""

from __future__ import annotations

import os
import resource
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.errors import InputError, TraceError
from profiler.trace_format import RoutingTrace
from profiler.trace_merge import merge_traces
from profiler.trace_sample import draw_per_domain, draw_sequences, draw_single_tokens, draw_tokens
from profiler.trace_split import Partition, by_domain, by_phase, by_sequence, safe_names, split_trace, write_selection
from tests.support.trace_files import save_trace, token_records

SEQUENCES = st.dictionaries(st.integers(0, 12), st.integers(2, 6), min_size=3, max_size=7)
TOLD = {"model_fingerprint": "f" * 64, "expert_bytes": "12", "source": "a lab", "tool": "another", "origin": "x"}
DOMAINS = ["code", "law", "", "code", "Law", "code", "law", "law", "../law", "code", "law", "code", "code"]


def parts_of(trace: RoutingTrace, by: str) -> Partition:
    return (
        {"domain": by_domain, "phase": by_phase}[by](trace) if by != "sequence" else by_sequence(trace, [0.6, 0.4], 1)
    )


@given(
    sequences=SEQUENCES,
    by=st.sampled_from(["domain", "phase", "sequence"]),
    without=st.sampled_from([[], ["weights"], ["weights", "token_ids"]]),
)
@settings(max_examples=40, deadline=None)
def test_split_then_merge_gives_back_the_tokens(sequences: dict[int, int], by: str, without: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = save_trace(folder / "whole.safetensors", sequences, domains=DOMAINS, metadata=TOLD, without=without)
        with RoutingTrace.open(whole) as trace:
            partition = parts_of(trace, by)
            paths = split_trace(trace, partition, folder / "parts")
            assert sorted((folder / "parts").iterdir()) == sorted(paths)
            for part, path in enumerate(paths):
                keep = np.flatnonzero(partition.part_T == part)
                with RoutingTrace.open(path) as split:
                    assert split.metadata == trace.metadata
                    assert set(split.columns) == set(trace.columns)
                    for column in trace.columns:
                        np.testing.assert_array_equal(split.column(column), trace.column(column)[keep])
        if len(paths) > 1:
            merge_traces(paths, folder / "merged")
            assert Counter(token_records(folder / "merged")) == Counter(token_records(whole))


@given(sequences=SEQUENCES, share=st.floats(0.3, 0.7), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_shares_of_sequences_are_met_and_repeatable(sequences: dict[int, int], share: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        with RoutingTrace.open(save_trace(Path(name) / "t", sequences)) as trace:
            first, again = (by_sequence(trace, [share, 1 - share], seed) for _ in range(2))
            ids = trace.sequence()
        np.testing.assert_array_equal(first.part_T, again.part_T)
        held = [set(ids[first.part_T == part].tolist()) for part in (0, 1)]
        assert not held[0] & held[1]
        assert abs(len(held[0]) - share * len(sequences)) <= 0.5


def test_another_seed_is_another_draw(tmp_path: Path) -> None:
    with RoutingTrace.open(save_trace(tmp_path / "t", dict.fromkeys(range(50), 1))) as trace:
        draws = [by_sequence(trace, [0.5, 0.5], seed).part_T.tolist() for seed in (0, 1)]
        assert draws[0] != draws[1]
        samples = [draw(trace, 20, seed).tolist() for draw in (draw_sequences, draw_single_tokens) for seed in (0, 1)]
    assert samples[0] != samples[1]
    assert samples[2] != samples[3]


def test_renumbered_parts_have_both_halves_and_their_domains(tmp_path: Path) -> None:
    whole = save_trace(tmp_path / "t.safetensors", {4: 2, 1: 3, 0: 1, 3: 2}, domains=["a", "b", "c", "b", "a"])
    with RoutingTrace.open(whole) as trace:
        kept = split_trace(trace, by_domain(trace), tmp_path / "kept")
        anew = split_trace(trace, by_domain(trace), tmp_path / "anew", renumber=True)
    assert [path.name for path in kept] == ["t-a.safetensors", "t-b.safetensors"]
    with RoutingTrace.open(kept[0]) as split:
        assert (split.sequence().tolist(), split.domains) == ([4, 4, 0], ("a", "b", "c", "b", "a"))
    with RoutingTrace.open(anew[0]) as split:
        assert (split.sequence().tolist(), split.domains) == ([0, 0, 1], ("a", "a"))
    with RoutingTrace.open(anew[1]) as split:
        assert (split.sequence().tolist(), split.domains) == ([0, 0, 0, 1, 1], ("b", "b"))


@given(st.lists(st.text(max_size=60), unique=True, max_size=8))
def test_names_of_parts_are_safe_and_differ(names: list[str]) -> None:
    safe = safe_names(names)
    assert len({name.casefold() for name in safe}) == len(names)
    for name in safe:
        assert Path(f"t-{name}.safetensors").name == f"t-{name}.safetensors"
        assert all(letter.isalnum() or letter in "-_" for letter in name)
        assert name


def test_names_that_collide_are_numbered() -> None:
    assert safe_names(["a/b", "a?b", "A_B", "a_b-2", "..", "", "日本"]) == [
        "a_b",
        "a_b-2",
        "A_B-3",
        "a_b-2-2",
        "unnamed",
        "unnamed-2",
        "日本",
    ]


def test_a_split_writes_all_files_or_none(tmp_path: Path) -> None:
    whole = save_trace(tmp_path / "t.safetensors", {0: 10, 1: 3000}, domains=["small", "large"])
    with RoutingTrace.open(whole) as trace:
        for folder in (tmp_path / "new", tmp_path / "old"):
            (tmp_path / "old").mkdir(exist_ok=True)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                with pytest.raises(TraceError, match=r"t-large.safetensors: cannot be written \(File too large\)"):
                    split_trace(trace, by_domain(trace), folder)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(each.name for each in tmp_path.rglob("*")) == ["old", "t.safetensors"]
        paths = split_trace(trace, by_domain(trace), tmp_path / "old")
        paths[0].unlink()
        with pytest.raises(TraceError, match=r"t-large.safetensors: exists already; remove it"):
            split_trace(trace, by_domain(trace), tmp_path / "old")
    assert list((tmp_path / "old").iterdir()) == paths[1:]


def test_files_that_cannot_take_their_places_leave_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save_trace(tmp_path / "t.safetensors", {0: 1, 1: 1}, domains=["a", "b"])
    replace = os.replace

    def fail_at_the_second(source: Path, target: Path) -> None:
        if target.name == "t-b.safetensors":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with RoutingTrace.open(whole) as trace, pytest.raises(TraceError, match=r"t-b.safetensors: cannot be written"):
        split_trace(trace, by_domain(trace), tmp_path / "parts")
    assert list(tmp_path.iterdir()) == [whole]


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save_trace(tmp_path / "t.safetensors", {0: 1}, domains=["a"])
    with RoutingTrace.open(whole) as trace:
        keep = np.ones(1, bool)
        for folder, message in ((whole, "is a file"), (tmp_path / "x" / "y", "create it first")):
            with pytest.raises(TraceError, match=message):
                split_trace(trace, by_domain(trace), folder)
        with pytest.raises(TraceError, match="is named twice, and would be overwritten"):
            write_selection(trace, keep, whole)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for a reader without the right to write
        for folder in (tmp_path, tmp_path / "new"):
            with pytest.raises(TraceError, match="does not exist or cannot be written"):
                split_trace(trace, by_domain(trace), folder)
        with pytest.raises(TraceError, match="does not exist or cannot be written"):
            write_selection(trace, keep, tmp_path / "s")
    assert list(tmp_path.iterdir()) == [whole]


def test_what_cannot_be_split_is_told(tmp_path: Path) -> None:
    decode = np.zeros(4, np.uint8)
    with RoutingTrace.open(save_trace(tmp_path / "t", {0: 2, 1: 2}, decode=decode)) as trace:
        with pytest.raises(TraceError, match="names no domains; record it"):
            by_domain(trace)
        with pytest.raises(TraceError, match="has no decode tokens, so there is nothing to split"):
            by_phase(trace)
        for shares in ([0.5, 0.2], [1.5, -0.5], [float("nan"), 1.0], [float("inf"), 1.0]):
            with pytest.raises(InputError, match="expected positive shares that add up to 1"):
                by_sequence(trace, shares)
        with pytest.raises(TraceError, match="part 2 of 2 would hold none of the 2 sequences"):
            by_sequence(trace, [0.9, 0.1])
        with pytest.raises(InputError, match="seed is -1, expected"):
            by_sequence(trace, [0.5, 0.5], -1)


@given(sequences=SEQUENCES, wanted=st.integers(1, 18), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_samples_hold_what_was_asked_for(sequences: dict[int, int], wanted: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = save_trace(Path(name) / "t", sequences, domains=DOMAINS, metadata=TOLD)
        with RoutingTrace.open(path) as trace:
            ids = trace.sequence()
            number = min(wanted, len(sequences))
            drawn = set(ids[draw_sequences(trace, number, seed)].tolist())
            assert len(drawn) == number
            assert drawn <= set(ids[draw_sequences(trace, len(sequences), seed)].tolist())

            tokens = min(wanted, trace.num_tokens)
            whole = draw_tokens(trace, tokens, seed)
            lengths = [sequences[sequence] for sequence in set(ids[whole].tolist())]
            assert sum(lengths) == whole.sum()
            assert tokens <= whole.sum() < tokens + max(lengths)

            single = draw_single_tokens(trace, tokens, seed)
            assert single.sum() == tokens
            write_selection(trace, single, Path(name) / "s")
            records = np.array(token_records(path), object)
            assert token_records(Path(name) / "s") == [tuple(record) for record in records[single]]
            with RoutingTrace.open(Path(name) / "s") as sample:
                assert sample.metadata == trace.metadata


def test_a_sample_takes_as_many_sequences_of_every_domain(tmp_path: Path) -> None:
    domains = [name for name in ("code", "law", "art") for _ in range(10)]
    with RoutingTrace.open(save_trace(tmp_path / "t", dict.fromkeys(range(25), 2), domains=domains)) as trace:
        for number in (1, 5):
            ids = np.unique(trace.sequence()[draw_per_domain(trace, number, seed=2)])
            assert Counter(domains[sequence] for sequence in ids) == dict.fromkeys(("code", "law", "art"), number)
        with pytest.raises(
            TraceError, match="has 5 sequences of domain 'art', 6 are wanted; name a number from 1 to 5"
        ):
            draw_per_domain(trace, 6)
        for draw, number, message in (
            (draw_sequences, 26, "has 25 sequences, 26 are wanted"),
            (draw_tokens, 0, "has 50 tokens, 0 are wanted; name a number from 1 to 50"),
            (draw_single_tokens, 51, "has 50 tokens, 51 are wanted"),
        ):
            with pytest.raises(TraceError, match=message):
                draw(trace, number)
