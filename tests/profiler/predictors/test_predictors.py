"""Every predictor against brute force, what it backs off to, and that it looks at nothing it may not know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.predictors.affinity import AffinityPredictor
from profiler.predictors.base import RANK_STEP, Context, Predictor, RouteSample
from profiler.predictors.gate_ahead import GateAheadPredictor
from profiler.predictors.kernels import top_experts
from profiler.predictors.paths import PathPredictor, PathTree
from profiler.predictors.popularity import PopularityPredictor
from profiler.predictors.registry import learn_predictors
from profiler.predictors.token_id import TokenIdPredictor
from tests.support.samples import chained_sample, random_sample

SHAPES = st.sampled_from([(2, 1), (6, 2), (5, 5), (300, 3)])


def shares(chosen: list[np.ndarray], num_experts: int) -> np.ndarray:
    """Share of tokens that chose each expert, earlier choices a little more, counted one by one."""
    counts = np.zeros(num_experts)
    for token in chosen:
        for rank, expert in enumerate(token):
            counts[expert] += 1 + (len(token) - 1 - rank) * RANK_STEP
    return counts / len(chosen)


def by_path(learned: RouteSample, layer: int, length: int, path: list[int]) -> tuple[np.ndarray, bool]:
    """Brute force: tokens that share the nearest ``length`` first choices, or fewer where none does."""
    wanted = min(length, layer)
    for used in range(wanted, -1, -1):
        same = [
            token[layer]
            for token in learned.experts
            if [int(e) for e in token[layer - used : layer, 0]] == path[layer - used : layer]
        ]
        if same:
            return shares(same, learned.num_experts), used == wanted
    raise AssertionError("the empty path is that of every token")


def by_affinity(learned: RouteSample, layer: int, before: np.ndarray) -> tuple[np.ndarray, bool]:
    """Brute force: the mean over the experts before; one that was never seen votes by popularity."""
    votes, known = [], True
    for expert in before:
        same = [token[layer] for token in learned.experts if expert in token[layer - 1]]
        known &= bool(same)
        votes.append(shares(same or [token[layer] for token in learned.experts], learned.num_experts))
    return np.mean(votes, axis=0), known


@given(tokens=st.integers(1, 40), shape=SHAPES, layer=st.integers(0, 3), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_estimates_equal_brute_force(tokens: int, shape: tuple[int, int], layer: int, seed: int) -> None:
    num_experts, top_k = shape
    learned = random_sample(tokens, num_experts=256 if num_experts == 300 else num_experts, top_k=top_k, seed=seed)
    asked = random_sample(9, num_experts=learned.num_experts, top_k=top_k, seed=seed + 1)
    context = asked.context(layer)
    popularity = shares(list(learned.chosen(layer)), learned.num_experts)
    for predictor in learn_predictors(learned, layer, longest_path=4):
        estimate = predictor.estimate(context)
        assert estimate.scores.dtype == np.float32
        assert estimate.scores.shape == (9, learned.num_experts)
        for token in range(9):
            seen = True
            if predictor.name == "popularity":
                expected = popularity
            elif isinstance(predictor, PathPredictor):
                path = [int(expert) for expert in asked.experts[token, :, 0]]
                expected, seen = by_path(learned, layer, predictor.length, path)
            elif predictor.name == "affinity":
                expected, seen = by_affinity(learned, layer, asked.experts[token, layer - 1])
            elif predictor.name == "gate-ahead":
                expected = shares([asked.gate_ahead[token, layer - 1]], learned.num_experts)
            else:
                same = [
                    e
                    for e, i in zip(learned.chosen(layer), learned.token_ids, strict=True)
                    if i == asked.token_ids[token]
                ]
                expected, seen = (shares(same, learned.num_experts), True) if same else (popularity, False)
            np.testing.assert_allclose(estimate.scores[token], expected, rtol=1e-6, err_msg=predictor.name)
            assert estimate.seen[token] == seen, predictor.name


def test_which_predictors_there_are() -> None:
    full, bare = random_sample(20), replace(random_sample(20), token_ids=None, gate_ahead=None)
    paths = ["path-1", "path-2", "path-3"]
    names = [predictor.name for predictor in learn_predictors(full, 2, longest_path=3)]
    assert names == ["popularity", "token-id", *paths, "affinity", "gate-ahead"]
    assert [predictor.name for predictor in learn_predictors(bare, 2, 3)] == ["popularity", *paths, "affinity"]
    assert [predictor.name for predictor in learn_predictors(full, 0)] == ["popularity", "token-id"]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_nothing_of_the_layer_or_of_later_ones_is_looked_at(layer: int) -> None:
    learned, asked = random_sample(200), random_sample(50, seed=1)
    other = random_sample(50, seed=2)
    experts = np.concatenate([asked.experts[:, :layer], other.experts[:, layer:]], axis=1)
    ahead = np.concatenate([asked.gate_ahead[:, :layer], other.gate_ahead[:, layer:]], axis=1)
    changed = replace(asked, experts=experts, gate_ahead=ahead)
    for predictor in learn_predictors(learned, layer):
        before, after = (predictor.estimate(sample.context(layer)) for sample in (asked, changed))
        np.testing.assert_array_equal(before.scores, after.scores)
        np.testing.assert_array_equal(before.seen, after.seen)


def test_a_path_that_was_never_seen_backs_off_to_its_nearest_part() -> None:
    first = np.array([[0, 1, 2], [3, 1, 4], [3, 1, 4], [0, 2, 5]], np.uint8)
    learned = RouteSample(first[:, :, None], 6)
    predictor = PathPredictor(PathTree.learn(learned, 2, longest=2), 2)
    asked = Context(np.array([[3, 1], [5, 1], [0, 4], [5, 2]], np.uint8)[:, :, None])
    estimate = predictor.estimate(asked)
    assert estimate.seen.tolist() == [True, False, False, False]
    expected = [[0, 0, 0, 0, 1, 0], [0, 0, 1 / 3, 0, 2 / 3, 0], [0, 0, 0.25, 0, 0.5, 0.25], [0, 0, 0, 0, 0, 1]]
    np.testing.assert_allclose(estimate.scores, expected, rtol=1e-6)


def test_a_history_shorter_than_the_path_is_used_as_far_as_it_goes() -> None:
    learned, asked = random_sample(300), random_sample(40, seed=1)
    tree = PathTree.learn(learned, 3, longest=3)
    nearest = Context(asked.experts[:, 2:3])
    found, expected = PathPredictor(tree, 3).estimate(nearest), PathPredictor(tree, 1).estimate(asked.context(3))
    np.testing.assert_array_equal(found.scores, expected.scores)
    none = PathPredictor(tree, 3).estimate(Context(asked.experts[:, :0]))
    np.testing.assert_array_equal(none.scores, PopularityPredictor.learn(learned, 3).estimate(nearest).scores)


def test_paths_of_many_experts_are_told_apart() -> None:
    # Five layers of 65,536 experts have 2^80 paths; these two differ in the farthest layer alone.
    path = np.full((2, 6), 65_535, np.uint16)
    path[:, 0] = 0, 1
    path[:, 5] = 7, 9
    predictor = PathPredictor(PathTree.learn(RouteSample(path[:, :, None], 65_536), 5, longest=5), 5)
    scores = predictor.estimate(Context(path[:, :5, None])).scores
    assert top_experts(scores, 1).ravel().tolist() == [7, 9]


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_chains_are_predicted_exactly(layer: int) -> None:
    learned, asked = chained_sample(400), chained_sample(60, seed=1)
    for predictor in learn_predictors(learned, layer):
        predicted = top_experts(predictor.estimate(asked.context(layer)).scores, 2)
        if predictor.name in ("popularity", "affinity"):
            assert (predicted == asked.chosen(layer)).mean() < 0.9
        else:
            np.testing.assert_array_equal(predicted, asked.chosen(layer), err_msg=predictor.name)


def test_equal_counts_rank_by_the_routers_order() -> None:
    sample = RouteSample(np.array([[[5, 2, 7]]], np.uint8), 8)
    predicted = top_experts(PopularityPredictor.learn(sample, 0).estimate(sample.context(0)).scores, 3)
    assert predicted.tolist() == [[5, 2, 7]]


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=6), count=st.integers(1, 5)
)
def test_top_experts_are_a_stable_sort(rows: list[list[int]], count: int) -> None:
    scores = np.array(rows, np.float32)
    np.testing.assert_array_equal(top_experts(scores, count), np.argsort(-scores, axis=1, kind="stable")[:, :count])


@pytest.mark.parametrize("kind", [AffinityPredictor, PopularityPredictor, TokenIdPredictor, GateAheadPredictor])
def test_no_tokens_are_a_batch_too(kind: type[Predictor]) -> None:
    sample = random_sample(30)
    predictors = {type(predictor): predictor for predictor in learn_predictors(sample, 1)}
    empty = Context(sample.experts[:0, :1], sample.token_ids[:0], sample.gate_ahead[:0, 0])
    for found in (predictors[kind], predictors[PathPredictor]):
        assert found.estimate(empty).scores.shape == (0, 6)
