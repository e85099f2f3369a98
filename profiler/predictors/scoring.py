"""How well every predictor does: learned from even sequences, judged on odd ones.

By token: how many of a token's experts were predicted. By batch, as Lina plans: the estimated popularity of a layer is
the sum of P(expert) over the batch's tokens (n_e in proportion to it), and planning was in vain where the true 2K most
popular experts differ from the estimated ones.

Theirs (Lina): the estimate, and planning anew where the set of the top 2k differs. Ours, since the text at hand gives
figures of "estimation accuracy" but not their formula: the share of the true 2K most popular that were estimated to be,
with experts that are equally popular in truth counted in the estimate's favour.

``choices=1`` judges any trace as if its model had routed to first choices alone.

Source: Lina (USENIX ATC 2023), Fate, ExpertFlow.

Shape suffixes: T tokens, L layers, K choices, E experts, N batches, B tokens of a batch, M most popular experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from profiler.errors import TraceError
from profiler.predictors.base import Estimate, Predictor, RouteSample
from profiler.predictors.kernels import count_hits, count_popular_hits, sum_rows, top_experts
from profiler.predictors.registry import LONGEST_PATH, learn_predictors
from profiler.predictors.sample import draw_sample
from profiler.profile import PredictorScore
from profiler.trace_format import RoutingTrace

#: Bounds on memory and time, whatever the trace's length. Tables of one layer are learned, judged and dropped.
MAX_LEARNED_TOKENS = 131_072
MAX_JUDGED_TOKENS = 65_536
BATCH_TOKENS = 32
NUM_BATCHES = 2000


@dataclass
class _Tally:
    """What is found about one predictor, layer after layer."""

    predictor: Predictor
    layer_ids: list[int] = field(default_factory=list)
    hit_rate_at: list[np.ndarray] = field(default_factory=list)
    backed_off: list[float] = field(default_factory=list)
    batch_accuracy: list[float] = field(default_factory=list)
    replan_rate: list[float] = field(default_factory=list)


def score_predictors(
    trace: RoutingTrace,
    *,
    choices: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    num_batches: int = NUM_BATCHES,
    longest_path: int = LONGEST_PATH,
    max_learned_tokens: int = MAX_LEARNED_TOKENS,
    max_judged_tokens: int = MAX_JUDGED_TOKENS,
    seed: int = 0,
) -> tuple[PredictorScore, ...]:
    """Learn every predictor from a trace's even sequences and judge it on the odd ones.

    Args:
        trace: an open trace.
        choices: take a token's first so many choices for all there are (default: all K).
        batch_tokens: B, tokens of a batch, drawn independently with replacement from those judged on.
        num_batches: batches drawn; every predictor and layer gets the same.
        longest_path: paths of 1 to so many layers.
        max_learned_tokens, max_judged_tokens: a longer half is sampled by sequence.
        seed: of samples and batches.

    Returns:
        One score per predictor, in the order of ``learn_predictors``; those that need what the trace does not have are
        left out. ``layer_ids`` lacks the first layer where a predictor needs one before it.

    Raises:
        TraceError: the trace has only even or only odd sequences, or ``choices`` is not one of 1 to K.
    """
    if choices is not None and not 1 <= choices <= trace.top_k:
        raise TraceError(f"choices {choices}: the trace has top-{trace.top_k}; take 1 to {trace.top_k}")
    learned = draw_sample(trace, trace.split_mask("even"), max_learned_tokens, seed, choices)
    judged = draw_sample(trace, trace.split_mask("odd"), max_judged_tokens, seed, choices)
    return score_samples(learned, judged, trace.layer_ids, batch_tokens, num_batches, longest_path, seed)


def score_samples(
    learned: RouteSample,
    judged: RouteSample,
    layer_ids: Sequence[int],
    batch_tokens: int = BATCH_TOKENS,
    num_batches: int = NUM_BATCHES,
    longest_path: int = LONGEST_PATH,
    seed: int = 0,
) -> tuple[PredictorScore, ...]:
    """Learn every predictor from one sample and judge it on another; see ``score_predictors``.

    Args:
        learned, judged: samples of one model; ``judged`` has token ids and ``gate_ahead`` where ``learned`` has them.
        layer_ids: decoder layers of the L layers.
        batch_tokens, num_batches, longest_path, seed: as there.
    """
    draws_NB = np.random.default_rng(seed).integers(judged.num_tokens, size=(num_batches, batch_tokens))
    tallies: dict[str, _Tally] = {}
    for layer, layer_id in enumerate(layer_ids):
        chosen_TK = np.ascontiguousarray(judged.chosen(layer))
        popularity_NE = _batch_popularity(chosen_TK, draws_NB, judged.num_experts)
        for predictor in learn_predictors(learned, layer, longest_path):
            tally = tallies.setdefault(predictor.name, _Tally(predictor))
            tally.layer_ids.append(layer_id)
            estimate = predictor.estimate(judged.context(layer))
            _judge_tokens(tally, estimate, chosen_TK)
            if 2 * chosen_TK.shape[1] < judged.num_experts:
                _judge_batches(tally, estimate, popularity_NE, draws_NB, 2 * chosen_TK.shape[1])
    return tuple(_score(tally, learned, judged, batch_tokens) for tally in tallies.values())


def _batch_popularity(chosen_TK: np.ndarray, draws_NB: np.ndarray, num_experts: int) -> np.ndarray:
    """Tokens of each batch that chose each expert, int64 ``[N, E]``."""
    num_batches = len(draws_NB)
    keys = np.arange(num_batches)[:, None, None] * num_experts + chosen_TK[draws_NB]
    return np.bincount(keys.ravel(), minlength=num_batches * num_experts).reshape(num_batches, num_experts)


def _judge_tokens(tally: _Tally, estimate: Estimate, chosen_TK: np.ndarray) -> None:
    num_tokens, top_k = chosen_TK.shape
    hits_K = count_hits(chosen_TK, top_experts(estimate.scores, top_k))
    tally.hit_rate_at.append(hits_K / (num_tokens * np.arange(1, top_k + 1)))
    tally.backed_off.append(float(1 - estimate.seen.mean()))


def _judge_batches(
    tally: _Tally, estimate: Estimate, popularity_NE: np.ndarray, draws_NB: np.ndarray, num_popular: int
) -> None:
    estimated_NM = top_experts(sum_rows(estimate.scores, draws_NB), num_popular)
    hits_N = count_popular_hits(popularity_NE, estimated_NM)
    tally.batch_accuracy.append(float(hits_N.mean() / num_popular))
    tally.replan_rate.append(float((hits_N < num_popular).mean()))


def _score(tally: _Tally, learned: RouteSample, judged: RouteSample, batch_tokens: int) -> PredictorScore:
    hit_rate_at = np.array(tally.hit_rate_at)
    batches = bool(tally.batch_accuracy)
    return PredictorScore(
        predictor=tally.predictor.name,
        description=tally.predictor.description,
        layer_ids=tuple(tally.layer_ids),
        hit_rate=hit_rate_at[:, -1],
        top1_hit_rate=hit_rate_at[:, 0],
        batch_accuracy=np.array(tally.batch_accuracy) if batches else None,
        replan_rate=np.array(tally.replan_rate) if batches else None,
        paper=tally.predictor.paper,
        hit_rate_at=hit_rate_at,
        backed_off=np.array(tally.backed_off),
        batch_tokens=batch_tokens if batches else None,
        learned_tokens=learned.num_tokens,
        judged_tokens=judged.num_tokens,
    )
