"""The load of the experts' slots: every pair counted once, where the dispatch rule sent it, on either path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from placement.plan import PlacementPlan
from runtime.load import Load, active_experts, balancedness, slots_as_lists
from runtime.requests import StepTime
from runtime.step_meter import TAKE_INTERVAL_S, WINDOW_S, MeterReading, StepMeter
from tests.support.native import drive, native_model
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool, Result

PROMPTS = [[7, 8, 9, 10], [20, 21], [33, 34, 35, 36, 37], [50], [61, 62, 63]]
ARRIVALS = [0, 0, 0, 2, 2]
NEW_TOKENS = 6
WIDTH = 32  # of the tiny models' hidden states
ROW_BYTES = 4 * WIDTH


def run(pool: RankPool, path: str, plan: PlacementPlan, exchange: str) -> list[Result]:
    return pool.run(Job(path, plan.to_dict(), exchange, PROMPTS, ARRIVALS, NEW_TOKENS))


def pairs_by_expert(load: Load, plan: PlacementPlan) -> np.ndarray:
    """``[L, E]``, summed over copies."""
    totals = np.zeros((plan.num_layers, plan.num_experts), dtype=np.int64)
    for layer, gpus in enumerate(slots_as_lists(load.pairs, plan.slots)):
        for held, counts in zip(plan.slots[layer], gpus, strict=True):
            np.add.at(totals[layer], list(held), counts)
    return totals


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
@pytest.mark.parametrize("kind", ["replicated", "uneven"])
def test_every_dispatched_pair_is_counted(
    exchange: str, kind: str, rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, kind, 2, exchange)
    results = run(rank_pool(2), path, plan, exchange)
    assert results[1].load is None
    load = results[0].load
    sources = results[:1] if exchange == "allreduce" else results  # where every rank has all tokens, one is enough
    for layer in range(plan.num_layers):
        routes = np.concatenate([ids.ravel() for result in sources for ids in result.routes[layer]])
        expected = np.bincount(routes, minlength=plan.num_experts)
        assert pairs_by_expert(load, plan)[layer].tolist() == expected.tolist()
    assert load.steps == NEW_TOKENS - 1 + ARRIVALS[-1] - 1  # the second arrivals' prefill is no decode step
    assert bool((load.active <= load.steps).all())
    assert bool((load.active <= load.pairs).all())
    # A token's first choices are distinct experts: a step has at least K active slots.
    assert bool((active_experts(load).sum(dim=1) >= plan.top_k).all())


def test_bytes_on_the_way(rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "uneven", 2)  # the last GPU computes what few experts it copies, or nothing
    fed = sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW_TOKENS - 1)
    ring = run(rank_pool(2), path, plan, "allreduce")[0].load
    assert ring.exchanged_bytes == 2 * plan.num_layers * fed * ROW_BYTES
    results = run(rank_pool(2), path, plan, "alltoall")
    # All experts are on GPU 0, one of them also on GPU 0 only: tokens of rank 1 go there and back, others stay.
    foreign = sum(len(ids) for ids in results[1].routes[0])
    assert plan.slots[0][1] == ()
    assert results[0].load.exchanged_bytes == 2 * plan.num_layers * foreign * ROW_BYTES


def test_native_path_counts_the_same(rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "contiguous", 1)
    expected = run(rank_pool(1), path, plan, "allreduce")[0].load
    model = native_model(path)  # five sequences take a step of eight rows
    drive(model, PROMPTS, ARRIVALS, NEW_TOKENS)
    found = model.take_load()
    assert found is not None
    assert torch.equal(found.pairs, expected.pairs)
    assert torch.equal(found.active, expected.active)
    assert found.steps == expected.steps
    again = model.take_load()
    assert again is not None
    assert (int(again.pairs.sum()), int(again.active.sum()), again.steps) == (0, 0, 0)


def make_load(pairs: list[list[list[int]]], steps: int = 4) -> Load:
    counts = torch.tensor(pairs)
    return Load(counts, counts.clamp(max=steps), steps)


def test_figures_of_a_load() -> None:
    load = make_load([[[4, 2], [0, 2]], [[0, 0], [0, 0]], [[0, 5], [5, 0]]])
    assert balancedness(load).tolist() == [(6 + 2) / 2 / 6, 1.0, 1.0]
    assert active_experts(load).tolist() == [[1.5, 0.5], [0, 0], [1, 1]]
    assert slots_as_lists(load.pairs, (((0, 1), (2, 3)), ((5,), ()), ((1, 2), (3, 4))))[1] == [[0], []]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter_reads_the_load_once_in_a_while() -> None:
    clock, taken = Clock(), []

    def take() -> Load:
        taken.append(clock.now)
        return make_load([[[3, 1]]], steps=1)

    meter = StepMeter(take, clock)
    assert meter.read() == MeterReading(0.0, None, None)
    for _ in range(35):
        clock.now += 0.1
        meter.stepped(StepTime(0.1, batch=8), num_tokens=8)
    assert len(taken) == 3
    assert np.diff(taken).min() >= TAKE_INTERVAL_S - 1e-6
    reading = meter.read()
    assert reading.tokens_per_s == pytest.approx(80)
    assert reading.recent is not None
    assert reading.recent.pairs.tolist() == [[[6, 2]]]
    assert reading.total is not None
    assert reading.total.pairs.tolist() == [[[9, 3]]]
    meter.idle()
    meter.idle()
    assert len(taken) == 4
    clock.now += WINDOW_S
    assert meter.read().recent is None
    assert meter.read().tokens_per_s == 0
    assert meter.read().total is not None


def test_meter_measures_pure_decode_steps_only() -> None:
    meter = StepMeter(lambda: None)
    heard: list[float] = []
    meter.on_decode_step = heard.append
    meter.stepped(StepTime(1.0, batch=2), 2)
    meter.stepped(StepTime(2.0, batch=2, prompt_tokens=5), 3)
    meter.stepped(StepTime(3.0, batch=0, prompt_tokens=5), 1)
    meter.stepped(StepTime(4.0, batch=0), 0)  # only tells the ranks who has ended
    assert heard == [1.0]
    assert meter.read().recent is None
