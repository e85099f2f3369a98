"""Profiles: phases, domains and windows against brute force; what controls, samples and short traces must give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler import convergence, trace_format
from profiler.__main__ import main
from profiler.affinity_groups import greedy_chain
from profiler.drift import sequence_of_tokens, time_windows
from profiler.measures import total_variation
from profiler.potential import kept_share
from profiler.profile_builder import profile_counts, profile_trace
from profiler.profile_json import profile_to_dict
from profiler.routing_counts import RoutingCounts
from profiler.statistics import collect_statistics
from profiler.trace_format import RoutingTrace
from tests.support.traces import RandomSequence, random_sequences, write_trace


def popularity_of(experts_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in experts_TLK.swapaxes(0, 1)])


def route(experts_TLK: np.ndarray, decode: bool = True) -> RandomSequence:
    num_tokens = len(experts_TLK)
    weights = np.ones(experts_TLK.shape, np.float16)
    tokens = (np.full(num_tokens, decode), np.zeros(num_tokens, int))
    return RandomSequence(experts_TLK, weights, *tokens, gate_ahead=experts_TLK[:, 1:])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), layers=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_groups_equal_brute_force(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], layers: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("trace")
    sequences = random_sequences(lengths, num_layers=layers, seed=seed)
    domains = [("code", "law", None)[n % 3] for n in range(len(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_format, "TOKENS_PER_CHUNK", 13)
        trace = RoutingTrace.open(write_trace(folder / "t", sequences, domains=domains))
        profile = profile_trace(trace)
    experts = np.concatenate([s.experts for s in sequences])
    decode = np.concatenate([s.decode for s in sequences])
    np.testing.assert_array_equal(profile.popularity, popularity_of(experts, 8))
    for name, mask in (("prefill", ~decode), ("decode", decode)):
        if mask.any():
            np.testing.assert_array_equal(profile.popularity_by_phase[name], popularity_of(experts[mask], 8))
            assert profile.tokens_by_phase[name] == mask.sum()
        else:
            assert name not in profile.popularity_by_phase
    for name in dict.fromkeys(domains):
        own = np.concatenate([s.experts for s, domain in zip(sequences, domains, strict=True) if domain == name])
        np.testing.assert_array_equal(profile.popularity_by_domain[name or "(unnamed)"], popularity_of(own, 8))
        assert profile.tokens_by_domain[name or "(unnamed)"] == len(own)
    assert profile.statistics is not None
    np.testing.assert_array_equal(profile.statistics.affinity, collect_statistics(trace).affinity)
    assert (profile.information is None) == (layers == 1)
    assert (profile.domain_drift is None) == (len(set(domains)) == 1)
    assert bool(profile.potentials) == (layers > 1 and len(lengths) > 1)
    json.dumps(profile_to_dict(profile), allow_nan=False)


def test_drift_between_domains_is_what_they_differ_by(tmp_path: Path) -> None:
    first, second = np.zeros((20, 2, 1), int), np.ones((60, 2, 1), int)
    trace = RoutingTrace.open(
        write_trace(tmp_path / "t", [route(first), route(second)] * 4, domains=["a", "b"] * 4, token_ids=False)
    )
    drift = profile_trace(trace).domain_drift
    assert drift is not None
    assert (drift.names, drift.tokens.tolist()) == (("a", "b"), [80, 240])
    np.testing.assert_allclose(drift.distance, [[0, 1], [1, 0]])
    np.testing.assert_allclose(drift.to_all, [0.75, 0.25])
    assert drift.to_all_control.sum() < drift.to_all.sum() / 2


def test_drift_over_time_exceeds_chance_only_where_there_is_any(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    steady = [route(generator.integers(0, 8, (50, 1, 1))) for _ in range(64)]
    turning = [route(generator.integers(0, 8, (50, 1, 1)) // (1 + (n >= 32))) for n in range(64)]
    for sequences, drifts in ((steady, False), (turning, True)):
        trace = RoutingTrace.open(write_trace(tmp_path / "t", sequences))
        drift = profile_trace(trace).time_drift
        assert drift is not None
        assert len(drift.names) == 16
        assert drift.tokens.sum() == 64 * 50
        gap = drift.to_all.mean() - drift.to_all_control.mean()
        assert gap > 0.1 if drifts else abs(gap) < 0.02


def test_windows_hold_whole_sequences_in_order() -> None:
    sequence_T = np.repeat(np.arange(12), [1, 1, 400, 1, 1, 5, 5, 5, 5, 5, 5, 5])
    windows = time_windows(sequence_T, seed=0)
    assert windows is not None
    by_sequence = [set(windows.group_T[sequence_T == s].tolist()) for s in range(12)]
    assert all(len(groups) == 1 for groups in by_sequence)
    assert (np.diff(windows.group_T) >= 0).all()
    assert set(windows.group_T.tolist()) == set(range(len(windows.names))), "no window is empty"
    assert sorted(windows.random_T[np.flatnonzero(np.diff(sequence_T, prepend=-1))].tolist()) == sorted(
        windows.group_T[np.flatnonzero(np.diff(sequence_T, prepend=-1))].tolist()
    )
    assert time_windows(np.repeat(np.arange(7), 9), seed=0) is None


def test_sequences_are_counted_in_the_order_of_the_trace(tmp_path: Path) -> None:
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([2, 1, 3])))
    assert sequence_of_tokens(trace).tolist() == [0, 0, 1, 2, 2, 2]


def test_convergence_compares_a_growing_sample_with_all_other_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "FIRST_TOKENS", 10)
    sequences = random_sequences([7, 9, 30, 11, 25, 18], num_layers=2, num_experts=4, top_k=2)
    trace = RoutingTrace.open(write_trace(tmp_path / "t", sequences, num_experts=4))
    statistics = collect_statistics(trace)
    sequence_T = sequence_of_tokens(trace)
    found = convergence.measure_convergence(trace, sequence_T, statistics.affinity, seed=3)
    assert found is not None
    assert found.tokens.tolist() == [10, 20, 40]
    order = np.random.default_rng(3).permutation(6)
    tokens = np.concatenate([np.flatnonzero(sequence_T == s) for s in order])
    for size, distance in zip(found.tokens, found.distance, strict=True):
        inside = np.isin(np.arange(trace.num_tokens), tokens[:size])
        sampled, others = (collect_statistics(trace, mask).affinity[0] for mask in (inside, ~inside))
        rows = np.where(sampled.sum(axis=1) > 0, total_variation(sampled, others), 1.0)
        assert distance == pytest.approx(np.average(rows, weights=others.sum(axis=1)))
    assert found.floor == found.distance[-1]


def test_convergence_of_a_deterministic_chain_is_immediate(tmp_path: Path) -> None:
    first = np.random.default_rng(0).integers(0, 4, (2000, 1, 1))
    trace = RoutingTrace.open(write_trace(tmp_path / "t", [route(np.concatenate([first, 3 - first], axis=1))]))
    found = profile_trace(trace).convergence
    assert found is not None
    assert (found.stable_at, found.floor) == (125, 0)


def test_locality_that_is_planted_is_found(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    labels = generator.permuted(np.tile(np.arange(8), (4, 1)), axis=1)  # expert of each hidden cluster member by layer
    sequences = [
        route(labels[:, generator.integers(0, 4, 100) * 2 + generator.integers(0, 2, (4, 100))[0]].T[:, :, None])
        for _ in range(6)
    ]
    potentials = profile_trace(RoutingTrace.open(write_trace(tmp_path / "t", sequences))).potentials
    assert [potential.num_gpus for potential in potentials] == [2, 4]
    assert all(potential.kept == 1.0 for potential in potentials)
    assert all(potential.contiguous < 0.9 for potential in potentials)


def test_kept_share_and_a_greedy_chain_by_hand() -> None:
    affinity = np.array([[[5, 1], [2, 4]]])
    assert kept_share(affinity, np.array([[0, 1], [0, 1]])) == pytest.approx(9 / 12)
    assert greedy_chain(np.array([[[1, 5], [4, 2]]]), [1, 1]).tolist() == [[0, 1], [1, 0]]


def test_counts_tell_popularity_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = RoutingCounts(np.array([[1, 3], [0, 0]]), "tiny", (3, 5), "by hand")
    profile = profile_counts(counts, "c.safetensors")
    assert (profile.statistics, profile.active, profile.potentials) == (None, None, ())
    counts.save(tmp_path / "c.safetensors")
    assert main(["stats", str(tmp_path / "c.safetensors"), "-o", str(tmp_path / "c.json")]) == 0
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["busiest_over_mean"]["all"] == [1.5, 0.0]
    assert "1.50" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "c.safetensors"), "-o", str(tmp_path / "c.safetensors2")]) == 2
    assert "name a .json file" in capsys.readouterr().err


def test_stats_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = random_sequences([40] * 10)
    path = write_trace(tmp_path / "t.safetensors", sequences, domains=["a", "b"] * 5, layer_ids=[1, 4, 9])
    assert main(["stats", str(path), "-o", str(tmp_path / "s.json")]) == 0
    shown = capsys.readouterr().out
    for text in ("per layer", "per phase and domain", "active experts of a layer, decode tokens", "on 4 GPUs:"):
        assert text in shown
    written = json.loads((tmp_path / "s.json").read_text())
    with RoutingTrace.open(path) as trace:
        assert written == json.loads(json.dumps(profile_to_dict(profile_trace(trace))))
    assert written["source"]["layer_ids"] == [1, 4, 9]
    phases = [written["popularity_by_phase"][name] for name in ("prefill", "decode")]
    assert np.sum(phases, axis=0).tolist() == written["popularity"]
    assert phases[0] != written["popularity"]
    assert "a longer trace may put it later" in shown
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s.json", "t.safetensors"]


def test_predictability_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = random_sequences([30] * 4)
    both = write_trace(tmp_path / "both.safetensors", sequences)
    one = write_trace(tmp_path / "one.safetensors", sequences[:1])
    assert main(["stats", str(both), "--predictability", "-o", str(tmp_path / "s.json")]) == 0
    assert "path-2" in capsys.readouterr().out
    names = [score["predictor"] for score in json.loads((tmp_path / "s.json").read_text())["predictors"]]
    assert {"popularity", "path-1", "path-2", "token-id"} <= set(names)
    assert main(["stats", str(one), "--predictability"]) == 0
    assert "not judged" in capsys.readouterr().out
    assert main(["stats", str(both)]) == 0
    assert "path-2" not in capsys.readouterr().out
