"""Sampling on the native path: the same choices as defined, alone, among others, and after a preemption."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from runtime.native.model import NativeModel
from runtime.requests import TokenLogprobs
from runtime.step_plan import Admission
from tests.support.native import Recording, native_model
from tests.support.sampled_requests import PROMPTS, RESOLVED, assert_chosen, assert_logprobs

NEW_TOKENS = 9


@pytest.fixture
def model(saved_model: Callable[[str], str]) -> NativeModel:
    return native_model(saved_model("qwen3_moe"))


class Run(Recording):
    """A recording with log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: dict[int, list[TokenLogprobs]] = {}

    def note(self, model: NativeModel, new: dict[int, int]) -> None:
        super().note(model, new)
        for sequence, logprobs in model.sampler.logprobs.items():
            self.logprobs.setdefault(sequence, []).append(logprobs)


def run(model: NativeModel, numbers: Sequence[int], generated: dict[int, list[int]] | None = None) -> Run:
    """Admit requests, two at a time, and decode until all have their tokens."""
    found, waiting = Run(), list(numbers)
    given = generated or {}
    while waiting or model.running:
        if waiting:
            joining, waiting = waiting[:2], waiting[2:]
            tokens = {number: [*PROMPTS[number], *given.get(number, [])] for number in joining}
            found.note(
                model,
                model.prefill(
                    [
                        Admission(n, tokens[n], 0, RESOLVED[n], NEW_TOKENS, generated=len(given.get(n, [])))
                        for n in joining
                    ]
                ),
            )
        if model.running:
            found.note(model, model.decode())
        due = [n for n in model.running if len(found.tokens[n]) + len(given.get(n, [])) >= NEW_TOKENS]
        model.retire(due)
    return found


def by_request(found: dict[int, list[np.ndarray]]) -> list[list[np.ndarray]]:
    return [found[number] for number in range(len(RESOLVED))]


def test_choices_are_as_defined(model: NativeModel) -> None:
    found = run(model, range(len(RESOLVED)))
    tokens = [found.tokens[number] for number in range(len(RESOLVED))]
    assert_chosen(tokens, by_request(found.logits))
    assert_logprobs(found.logprobs, tokens, by_request(found.logits))


def test_same_tokens_alone_and_after_a_preemption(model: NativeModel) -> None:
    together = run(model, range(len(RESOLVED)))
    for number in range(len(RESOLVED)):
        assert run(model, [number]).tokens[number] == together.tokens[number]
    before = {number: tokens[:4] for number, tokens in together.tokens.items()}
    after = run(model, range(len(RESOLVED)), before)
    assert {number: before[number] + after.tokens[number] for number in before} == together.tokens
