"""Sampling on the universal path over ranks: the same choices as defined, and log-probabilities that reach rank 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.sampled_requests import PROMPTS, RESOLVED, assert_chosen, assert_logprobs

NEW_TOKENS = 6
ARRIVALS = [0, 0, 1, 1, 3, 0]


@pytest.mark.parametrize("exchange", ["allreduce", "alltoall"])
def test_choices_are_as_defined(
    exchange: str, rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "replicated", 2, exchange)
    job = Job(path, plan.to_dict(), exchange, PROMPTS, ARRIVALS, NEW_TOKENS, sampling=RESOLVED)
    results = rank_pool(2).run(job)
    assert results[1].tokens == results[0].tokens
    logits = {number: rows for result in results for number, rows in result.logits.items()}
    tokens = [results[0].tokens[number] for number in range(len(PROMPTS))]
    by_request = [logits[number] for number in range(len(PROMPTS))]
    assert_chosen(tokens, by_request)
    assert_logprobs(results[0].logprobs, tokens, by_request)
