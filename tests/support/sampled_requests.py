"""Requests that use every field of sampling, and the check that a path chose as they say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from runtime.requests import SamplingParameters, TokenLogprobs
from tests.support.slow_sampling import slow_choice

PROMPTS = [[5, 6, 7, 8, 9], [100, 11, 12], [3] * 8, [9, 8, 7], [20, 21], [4, 5, 6, 5, 4]]
REQUESTS = [
    SamplingParameters(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=3),
    SamplingParameters(temperature=1.3, top_k=9, top_p=0.9, seed=2),
    SamplingParameters(temperature=0.8, min_p=0.05, presence_penalty=1.5, seed=3, logprobs=0),
    SamplingParameters(temperature=0),
    SamplingParameters(temperature=1.0, top_p=0.8, seed=5, logprobs=20),
    SamplingParameters(temperature=0, logit_bias=((77, 100.0),), stop_token_ids=(77,), min_tokens=3),
]
RESOLVED = [request.resolved(()) for request in REQUESTS]


def assert_chosen(tokens: Sequence[Sequence[int]], logits: Sequence[Sequence[np.ndarray]]) -> None:
    """Every token of every prompt is what the slow definition takes from the logits that the model gave.

    Where rounding could turn a decision, which is seldom, nothing is expected.
    """
    decided = []
    for request, prompt, generated, rows in zip(RESOLVED, PROMPTS, tokens, logits, strict=True):
        for step, (token, row) in enumerate(zip(generated, rows, strict=True)):
            choice = slow_choice(row.tolist(), request, prompt, generated[:step])
            decided.append(choice.margin > 1e-5)
            assert token == choice.token or not decided[-1]
    assert sum(decided) >= 0.9 * len(decided)
    first_end = list(tokens[-1]).index(77)
    assert first_end == 3, "what is forbidden at first comes as soon as it may"


def assert_logprobs(
    found: dict[int, list[TokenLogprobs]], tokens: Sequence[Sequence[int]], logits: Sequence[Sequence[np.ndarray]]
) -> None:
    """Those that were asked for are the model's own."""
    assert sorted(found) == [number for number, request in enumerate(RESOLVED) if request.logprobs is not None]
    for number, rows in found.items():
        assert len(rows) == len(tokens[number])
        for logprobs, token, row in zip(rows, tokens[number], logits[number], strict=True):
            expected = torch.log_softmax(torch.from_numpy(row).double(), dim=0)
            np.testing.assert_allclose(logprobs.chosen, float(expected[token]), atol=1e-5)
            values, ids = expected.topk(RESOLVED[number].logprobs or 0)
            assert [token_id for token_id, _ in logprobs.top] == ids.tolist()
            np.testing.assert_allclose([value for _, value in logprobs.top], values, atol=1e-5)
