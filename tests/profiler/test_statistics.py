"""Statistics against brute force, and mutual information against what theory says."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from profiler import counting, statistics, trace_format
from profiler.errors import TraceError
from profiler.statistics import (
    RoutingStatistics,
    collect_by_domain,
    collect_statistics,
    mutual_information,
    save_statistics,
    shuffled_affinity,
)
from profiler.trace_format import RoutingTrace
from tests.support.traces import random_sequences, write_trace


def brute_force(experts_TLK: np.ndarray, num_experts: int) -> RoutingStatistics:
    num_tokens, num_layers, _ = experts_TLK.shape
    popularity, top1 = (np.zeros((num_layers, num_experts), np.int64) for _ in range(2))
    affinity, top1_affinity = (np.zeros((num_layers - 1, num_experts, num_experts), np.int64) for _ in range(2))
    coactivation = np.zeros((num_layers, num_experts, num_experts), np.int64)
    for token in experts_TLK:
        for layer, chosen in enumerate(token):
            top1[layer, chosen[0]] += 1
            for a in chosen:
                popularity[layer, a] += 1
                for b in chosen:
                    coactivation[layer, a, b] += 1
            if layer + 1 < num_layers:
                top1_affinity[layer, chosen[0], token[layer + 1, 0]] += 1
                for a in chosen:
                    for b in token[layer + 1]:
                        affinity[layer, a, b] += 1
    return RoutingStatistics(num_tokens, popularity, top1, affinity, top1_affinity, coactivation)


def assert_equal(found: RoutingStatistics, expected: RoutingStatistics) -> None:
    assert found.num_tokens == expected.num_tokens
    for name in ("popularity", "top1_popularity", "affinity", "top1_affinity", "coactivation"):
        assert getattr(found, name).dtype == np.int64
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    num_layers=st.integers(1, 4),
    shape=st.sampled_from([(1, 1), (5, 2), (8, 4), (300, 3)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_statistics_equal_brute_force(lengths: list[int], num_layers: int, shape: tuple[int, int], seed: int) -> None:
    num_experts, top_k = shape
    sequences = random_sequences(lengths, num_layers=num_layers, num_experts=num_experts, top_k=top_k, seed=seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "TOKENS_PER_CHUNK", 7)
        patch.setattr(trace_format, "TOKENS_BETWEEN_RELEASES", 20)
        path = write_trace(Path(folder) / "t", sequences, num_experts=num_experts)
        trace = RoutingTrace.open(path)
        experts = np.concatenate([sequence.experts for sequence in sequences])
        assert_equal(collect_statistics(trace), brute_force(experts, num_experts))
        mask = np.random.default_rng(seed).random(len(experts)) < 0.4
        mask[0] = True
        assert_equal(collect_statistics(trace, mask), brute_force(experts[mask], num_experts))


def test_domains_add_up(tmp_path: Path) -> None:
    domains = ["code", "law", None, "code", "law"]
    sequences = random_sequences([3, 5, 2, 7, 1])
    trace = RoutingTrace.open(write_trace(tmp_path / "t", sequences, domains=domains))
    by_domain = collect_by_domain(trace)
    assert list(by_domain) == ["code", "law", "(unnamed)"]
    assert [entry.num_tokens for entry in by_domain.values()] == [10, 6, 2]
    code = np.concatenate([sequences[0].experts, sequences[3].experts])
    assert_equal(by_domain["code"], brute_force(code, 8))
    overall = collect_statistics(trace)
    np.testing.assert_array_equal(sum(entry.affinity for entry in by_domain.values()), overall.affinity)
    save_statistics(trace, tmp_path / "s", overall, by_domain)
    stored = load_file(tmp_path / "s")
    np.testing.assert_array_equal(stored["coactivation"], overall.coactivation)
    np.testing.assert_array_equal(stored["domains.1.popularity"], by_domain["law"].popularity)


def test_a_trace_without_domains_says_so(tmp_path: Path) -> None:
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([3])))
    with pytest.raises(TraceError, match="names no domains"):
        collect_by_domain(trace)


def test_masks_are_checked(tmp_path: Path) -> None:
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([3])))
    with pytest.raises(TraceError, match="no token is selected"):
        collect_statistics(trace, np.zeros(3, bool))
    with pytest.raises(TraceError, match=r"int64 \(3,\) was given, expected bool \(3,\)"):
        collect_statistics(trace, np.zeros(3, np.int64))
    with pytest.raises(TraceError, match=r"bool \(4,\) was given"):
        shuffled_affinity(trace, np.ones(4, bool))


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.eye(8) * 5) == pytest.approx(3.0)
    assert mutual_information(np.outer([1, 2, 3], [4, 1, 1])) == pytest.approx(0.0, abs=1e-12)
    # A binary symmetric channel with error 1/4 carries 1 - H(1/4) bits.
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(0.1887218755)


def test_the_shuffle_keeps_popularity_and_destroys_affinity(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    [sequence] = random_sequences([20_000])
    experts = sequence.experts.copy()
    experts[:, 1] = (experts[:, 0] + 1) % 8  # layer 1 follows layer 0
    experts[:, 2] = np.stack([generator.permutation(8)[:2] for _ in range(len(experts))])
    sequence = replace(sequence, experts=experts)
    trace = RoutingTrace.open(write_trace(tmp_path / "t", [sequence]))
    true = collect_statistics(trace)
    shuffled, shuffled_top1 = shuffled_affinity(trace, seed=1)
    for axis in (1, 2):
        np.testing.assert_array_equal(shuffled.sum(axis=axis), true.affinity.sum(axis=axis))
        np.testing.assert_array_equal(shuffled_top1.sum(axis=axis), true.top1_affinity.sum(axis=axis))
    assert mutual_information(true.top1_affinity[0]) > 1
    assert mutual_information(shuffled_top1[0]) < 0.01
    assert mutual_information(shuffled[0]) < 0.01 < mutual_information(true.affinity[0])
    assert mutual_information(true.affinity[1]) < 0.01
    np.testing.assert_array_equal(shuffled, shuffled_affinity(trace, seed=1)[0])


def test_the_shuffle_samples_long_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([30, 20])))
    monkeypatch.setattr(statistics, "MOST_SHUFFLED_TOKENS", 10)
    mask = trace.split_mask("even")
    for chosen, tokens in ((None, 10), (mask, 10)):
        shuffled, shuffled_top1 = shuffled_affinity(trace, chosen)
        assert (shuffled.sum(axis=(1, 2)) == tokens * 4).all()
        assert (shuffled_top1.sum(axis=(1, 2)) == tokens).all()
    monkeypatch.setattr(statistics, "MOST_SHUFFLED_TOKENS", 40)
    assert (shuffled_affinity(trace, mask)[1].sum(axis=(1, 2)) == 30).all(), "no more than the mask selects"


def test_tables_that_cannot_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([3, 4]), domains=["a", "b"]))
    monkeypatch.setattr(counting, "MOST_TABLE_BYTES", 1000)
    with pytest.raises(TraceError, match="the tables of 3 layers of 8 experts for 2 groups"):
        collect_by_domain(trace)
    assert collect_statistics(trace).num_tokens == 7, "the overall tables are always made"
