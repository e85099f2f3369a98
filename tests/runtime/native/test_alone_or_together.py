"""A request gets the same tokens alone and among others, whatever comes, goes, shares, is cut or is preempted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.native.worker import NativeWorker
from runtime.settings import EngineSettings
from runtime.step_plan import StepPlan
from runtime.worker_interface import ModelFacts
from tests.support.native import native_model
from tests.support.schedules import Arrival, Play, tokens_of

PAGE_SIZE = 8
GENERATOR = random.Random(0)
STEM = tuple(GENERATOR.randrange(4, 120) for _ in range(40))
GREEDY = (("temperature", 0.0),)
SAMPLED = (("temperature", 1.0), ("top_p", 0.9), ("seed", 7))


def prompt(common: int, length: int, number: int) -> tuple[int, ...]:
    """So many tokens that others begin with too, then some of its own."""
    own = random.Random(number)
    return (*STEM[:common], *(own.randrange(4, 120) for _ in range(length)))


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 25),
        prompt=st.builds(prompt, st.sampled_from([0, 8, 20, 40]), st.integers(1, 12), st.integers(0, 2)),
        max_tokens=st.integers(1, 16),
        cancel_after=st.sampled_from([None, None, 1, 5]),
        user=st.sampled_from(["", "a"]),
        sampling=st.sampled_from([GREEDY, SAMPLED]),
    ),
    min_size=3,
    max_size=7,
).map(lambda arrivals: sorted(arrivals, key=lambda arrival: arrival.step))


@cache
def native_worker(path: str, overlaps: bool, cache_tokens: int) -> NativeWorker:
    model = native_model(path, page_size=PAGE_SIZE, cache_tokens=cache_tokens, max_prefill_tokens=64)
    group = cast(Any, SimpleNamespace(world_size=1, device=torch.device("cpu")))
    facts = ModelFacts("native", 128, torch.float32, model.max_context, (), cache=model.cache_size)
    worker = NativeWorker(model, facts, group)
    worker.overlaps = overlaps
    return worker


def play(worker: NativeWorker, settings: EngineSettings, schedule: list[Arrival]) -> Play:
    """Play it, and leave nothing in the worker: an engine that stops may not have retired its last sequences yet."""
    played = Play(worker, settings, schedule)
    worker.launch(StepPlan(retire=list(range(len(schedule))), decode=False))()
    return played


@cache
def alone(path: str, arrival: Arrival) -> list[int]:
    """A request's tokens, with the model and the cache to itself and its prompt fed at once."""
    worker = native_worker(path, False, 512)
    return tokens_of(play(worker, EngineSettings(prefix_cache=False), [arrival]).events[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@settings(deadline=None, derandomize=True, max_examples=6)
@given(
    schedule=ARRIVALS,
    overlaps=st.booleans(),
    prefix_cache=st.booleans(),
    max_prefill_tokens=st.sampled_from([3, 16, 64]),
)
def test_native(
    family: str, schedule: list[Arrival], overlaps: bool, saved_model: Callable[[str], str], **changes: Any
) -> None:
    """In a cache that holds the longest request and little more."""
    path = saved_model(family)
    played = play(native_worker(path, overlaps, 80), EngineSettings(max_sequences=8, **changes), schedule)
    expected = [alone(path, replace(arrival, step=0, cancel_after=None, user="")) for arrival in schedule]
    played.check_against(expected)
    assert played.status.cache_usage == 0


def test_native_schedules_do_preempt_share_and_cut(saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    schedule = [Arrival(0, prompt(20, 3, number), 20, sampling=SAMPLED) for number in range(3)]
    chosen = EngineSettings(max_sequences=8, max_prefill_tokens=10)
    played = play(native_worker(path, True, 80), chosen, schedule)
    played.check_against([alone(path, arrival) for arrival in schedule])
    assert played.status.preemptions > 0
    assert played.status.prefix_hit_tokens > 0
    assert any(piece.start for plan in played.plans for piece in plan.feed)
