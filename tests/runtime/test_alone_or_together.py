"""A request gets the same tokens alone and among others on the universal path, on one rank and on two."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.support.plans import make_plan
from tests.support.rank_pool import EngineJob, RankPool
from tests.support.schedules import NEVER, Arrival, check_events, tokens_of


@pytest.mark.parametrize(
    ("family", "exchange", "ranks"),
    [("qwen3_moe", "allreduce", 1), ("qwen3_moe", "alltoall", 2), ("gpt_oss", "allreduce", 2)],
)
def test_universal(
    family: str,
    exchange: str,
    ranks: int,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
) -> None:
    """Ranks without sequences of their own take part, and prompts longer than a step's share are cut."""
    path, own = saved_model(family), random.Random(ranks)
    schedule = [
        Arrival(
            step=own.randrange(25),
            prompt=tuple(own.randrange(4, 120) for _ in range(own.choice([2, 5, 30]))),
            max_tokens=own.randrange(1, 15),
            cancel_after=own.choice([None, None, 4]),
        )
        for _ in range(12)
    ]
    schedule.sort(key=lambda arrival: arrival.step)
    plan = make_plan(path, "replicated", ranks, exchange).to_dict()

    def run(arrivals: list[Arrival], **changes: Any) -> Any:
        return rank_pool(ranks).run(EngineJob(path, plan, exchange, tuple(arrivals), changes))[0]

    one_by_one = run([replace(arrival, step=NEVER, cancel_after=None) for arrival in schedule])
    together = run(schedule, max_prefill_tokens=8, max_sequences=6)
    check_events(together.events, schedule, [tokens_of(events) for events in one_by_one.events])
    assert sum(map(bool, together.pieces)) > sum(map(bool, one_by_one.pieces)), "prompts were cut"
