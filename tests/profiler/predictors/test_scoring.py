"""Scores against brute force and planted structure, through trace files and samples."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from profiler.errors import TraceError
from profiler.predictors.base import RouteSample
from profiler.predictors.kernels import count_hits, count_popular_hits
from profiler.predictors.sample import draw_sample
from profiler.predictors.scoring import score_predictors, score_samples
from profiler.predictors.table import predictability_table
from profiler.profile import PredictorScore
from profiler.trace_format import RoutingTrace, TraceWriter
from tests.support.samples import chained_sample, random_sample
from tests.support.traces import random_sequences, write_trace


def by_name(scores: tuple[PredictorScore, ...]) -> dict[str, PredictorScore]:
    return {score.predictor: score for score in scores}


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=5), top_k=st.integers(1, 3), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_popularity_equals_brute_force(lengths: list[int], top_k: int, seed: int) -> None:
    sequences = random_sequences(lengths, num_layers=2, num_experts=5, top_k=top_k, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trace = RoutingTrace.open(write_trace(Path(folder) / "t", sequences, num_experts=5))
        score = by_name(score_predictors(trace, num_batches=50, batch_tokens=3))["popularity"]
    learned = np.concatenate([sequence.experts for sequence in sequences[0::2]])
    judged = np.concatenate([sequence.experts for sequence in sequences[1::2]])
    draws = np.random.default_rng(0).integers(len(judged), size=(50, 3))
    assert (score.learned_tokens, score.judged_tokens) == (len(learned), len(judged))
    for layer in range(2):
        votes: Counter[int] = Counter()
        for token in learned:
            votes.update({int(e): 1 + (top_k - 1 - rank) * 2.0**-16 for rank, e in enumerate(token[layer])})
        ranked = sorted(range(5), key=lambda e: (-np.float32(votes[e] / len(learned)), e))
        for k in range(1, top_k + 1):
            hits = [len({*map(int, token[layer, :k])} & {*ranked[:k]}) / k for token in judged]
            assert score.hit_rate_at[layer, k - 1] == pytest.approx(np.mean(hits))
        if 2 * top_k >= 5:
            assert score.batch_accuracy is None
            continue
        accuracy = []
        for batch in draws:
            true = Counter(judged[batch, layer].ravel().tolist())
            # Of the orders that the counts allow, the one that favours the estimate.
            best = sorted(range(5), key=lambda e: (-true[e], e not in ranked[: 2 * top_k]))
            accuracy.append(len({*best[: 2 * top_k]} & {*ranked[: 2 * top_k]}) / (2 * top_k))
        assert score.batch_accuracy[layer] == pytest.approx(np.mean(accuracy))
        assert score.replan_rate[layer] == pytest.approx(np.mean(np.array(accuracy) < 1))
    np.testing.assert_array_equal(score.hit_rate, score.hit_rate_at[:, -1])
    np.testing.assert_array_equal(score.top1_hit_rate, score.hit_rate_at[:, 0])


def test_chains_reach_100_percent() -> None:
    scores = by_name(score_samples(chained_sample(500), chained_sample(300, seed=1), (4, 5, 7, 9), num_batches=100))
    for name, score in scores.items():
        if name in ("popularity", "affinity"):
            continue
        assert score.hit_rate.tolist() == [1] * len(score.layer_ids), name
        assert score.batch_accuracy.tolist() == [1] * len(score.layer_ids), name
        assert not score.replan_rate.any(), name
        assert not score.backed_off.any(), name
    assert scores["path-6"].layer_ids == (5, 7, 9) == scores["gate-ahead"].layer_ids
    assert scores["token-id"].layer_ids == (4, 5, 7, 9)
    assert scores["popularity"].hit_rate.max() < 0.5


def test_what_the_trace_holds_decides_which_predictors_are_scored(tmp_path: Path) -> None:
    sample = chained_sample(40)
    for ids, ahead in ((True, True), (True, False), (False, True), (False, False)):
        with TraceWriter(
            tmp_path / "t",
            model="tiny",
            num_experts=8,
            layer_ids=(3, 4, 6, 8),
            top_k=2,
            weights=False,
            token_ids=ids,
            gate_ahead=ahead,
        ) as writer:
            for tokens in (slice(0, 25), slice(25, 40)):
                writer.add_sequence(
                    sample.experts[tokens],
                    decode=np.ones(len(sample.experts[tokens]), bool),
                    token_ids=sample.token_ids[tokens] if ids else None,
                    gate_ahead=sample.gate_ahead[tokens] if ahead else None,
                )
        scores = by_name(score_predictors(RoutingTrace.open(tmp_path / "t"), num_batches=20))
        assert ("token-id" in scores, "gate-ahead" in scores) == (ids, ahead)
        if ahead:
            assert scores["gate-ahead"].layer_ids == (4, 6, 8)
            assert (scores["gate-ahead"].hit_rate_at == 1).all()


def test_independent_layers_leave_the_level_of_popularity() -> None:
    generator = np.random.default_rng(0)
    rank = generator.gumbel(size=(4, 16)) * 0.7 + generator.gumbel(size=(30_000, 4, 16))
    experts = np.argsort(-rank, axis=-1)[..., :2].astype(np.uint8)
    learned, judged = RouteSample(experts[:20_000], 16), RouteSample(experts[20_000:], 16)
    scores = by_name(score_samples(learned, judged, range(4)))
    for name in ("path-1", "path-2", "affinity"):
        gain = scores[name].hit_rate - scores["popularity"].hit_rate[1:]
        assert np.abs(gain).max() < 0.03, name
    shuffled = replace(judged, experts=generator.permutation(judged.experts, axis=0))
    for score in score_samples(learned, shuffled, range(4)):
        np.testing.assert_allclose(score.hit_rate, scores[score.predictor].hit_rate)


def test_a_layer_is_judged_by_its_own_choices_and_predicted_without_them() -> None:
    learned, judged = chained_sample(300), chained_sample(200, seed=1)
    moved = judged.experts.copy()
    moved[:, 3] = (moved[:, 3] + 1) % 8
    before, after = (
        by_name(score_samples(learned, sample, range(4))) for sample in (judged, replace(judged, experts=moved))
    )
    for name, score in after.items():
        np.testing.assert_array_equal(score.hit_rate[:-1], before[name].hit_rate[:-1], err_msg=name)
    # Predictions stayed as they were, so the first of two predicted is now no choice, the second the first choice.
    for name in ("path-3", "token-id"):
        assert (after[name].hit_rate[-1], after[name].top1_hit_rate[-1]) == (0.5, 0)


def test_one_layer_has_no_paths(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", random_sequences([5, 5], num_layers=1), token_ids=False)
    [score] = score_predictors(RoutingTrace.open(path))
    assert (score.predictor, score.layer_ids) == ("popularity", (0,))


def test_popularity_of_a_batch_means_nothing_where_2k_are_all_experts(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", random_sequences([9, 9], num_experts=4), num_experts=4)
    assert all(score.batch_accuracy is None for score in score_predictors(RoutingTrace.open(path)))


def test_where_all_experts_are_chosen_all_are_hit(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", random_sequences([5, 5], num_experts=3, top_k=3), num_experts=3)
    for score in score_predictors(RoutingTrace.open(path)):
        assert (score.hit_rate == 1).all()
        assert score.batch_accuracy is score.replan_rate is score.batch_tokens is None


def test_first_choices_alone_can_be_judged(tmp_path: Path) -> None:
    sequences = random_sequences([30, 30], top_k=3)
    firsts = [
        replace(sequence, experts=sequence.experts[:, :, :1], weights=sequence.weights[:, :, :1])
        for sequence in sequences
    ]
    all_choices = RoutingTrace.open(write_trace(tmp_path / "all", sequences))
    one_choice = RoutingTrace.open(write_trace(tmp_path / "one", firsts))
    assert_same(score_predictors(all_choices, choices=1), score_predictors(one_choice))
    with pytest.raises(TraceError, match="choices 4: the trace has top-3; take 1 to 3"):
        score_predictors(all_choices, choices=4)


def test_one_sequence_cannot_be_judged(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no tokens in odd sequences"):
        score_predictors(RoutingTrace.open(write_trace(tmp_path / "t", random_sequences([9]))))


def test_a_long_trace_is_sampled_by_sequence(tmp_path: Path) -> None:
    lengths = [7, 3, 8, 2, 9, 4]
    trace = RoutingTrace.open(write_trace(tmp_path / "t", random_sequences(lengths)))
    mask = trace.split_mask("even")
    whole = draw_sample(trace, mask, 24)
    np.testing.assert_array_equal(whole.experts, trace.experts()[mask])
    drawn = [draw_sample(trace, mask, 10, seed) for seed in range(6)]
    assert {sample.num_tokens for sample in drawn} == {10}
    assert len({sample.token_ids.tobytes() for sample in drawn}) > 1
    np.testing.assert_array_equal(drawn[1].experts, draw_sample(trace, mask, 10, seed=1).experts)
    ids, starts = trace.token_ids(), np.cumsum([0, *lengths])
    sequences = [ids[a:b].tolist() for a, b in pairwise(starts)][::2]
    for sample in drawn:  # the first tokens of each sequence drawn, at most one of them cut
        rest, cut = sample.token_ids.tolist(), 0
        for sequence in sequences:
            same = next((n for n in range(len(sequence), 0, -1) if rest[:n] == sequence[:n]), 0)
            cut += 0 < same < len(sequence)
            rest = rest[same:]
        assert (rest, cut <= 1) == ([], True)
    scores = score_predictors(trace, max_learned_tokens=10, max_judged_tokens=5)
    assert {(score.learned_tokens, score.judged_tokens) for score in scores} == {(10, 5)}


def test_scores_repeat() -> None:
    learned, judged = random_sample(300), random_sample(200, seed=1)
    once, again, other = (score_samples(learned, judged, range(4), num_batches=40, seed=seed) for seed in (3, 3, 4))
    assert_same(once, again)
    assert any((a.replan_rate != b.replan_rate).any() for a, b in zip(once, other, strict=True))


def test_equally_popular_experts_count_for_the_estimate() -> None:
    popularity = np.array([[3, 1, 1, 1, 0], [3, 1, 1, 1, 0], [2, 2, 1, 0, 0]])
    estimated = np.array([[0, 3], [1, 2], [2, 0]], np.int32)
    assert count_popular_hits(popularity, estimated).tolist() == [2, 1, 1]


def test_hits_at_k_compare_the_first_k() -> None:
    assert count_hits(np.array([[4, 2, 1]]), np.array([[2, 4, 3]])).tolist() == [0, 2, 2]


def test_the_table_means_over_the_layers_that_all_predict() -> None:
    scores = score_samples(random_sample(300), random_sample(200, seed=1), (0, 2, 3, 5), num_batches=50)
    lines = render(scores)
    cells = {score.predictor: score.hit_rate[-3:].mean() for score in scores}
    for name, hit_rate in cells.items():
        assert f" {hit_rate:.1%} " in next(line for line in lines if f" {name} " in line).split("│")[2], name
    assert f"{scores[0].hit_rate.mean():.1%}" != f"{cells['popularity']:.1%}"
    assert "Lina: 60-64%, re-plans 23%" in next(line for line in lines if "path-3" in line)
    assert "mean of 3 layers; learned from 300 tokens" in "".join(lines)


def render(scores: tuple[PredictorScore, ...]) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(predictability_table(scores))
    return capture.get().splitlines()


def assert_same(some: tuple[PredictorScore, ...], others: tuple[PredictorScore, ...]) -> None:
    for one, other in zip(some, others, strict=True):
        for field in fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)
