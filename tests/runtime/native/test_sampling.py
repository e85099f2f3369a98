"""Sampling on the native path: the same choices as defined, alone, among others, and after a preemption."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from runtime.native.model import NativeModel
from runtime.requests import TokenLogprobs
from runtime.step_plan import Admission, Piece, StepPlan
from tests.support.native import Recording, native_model, retire
from tests.support.sampled_requests import PROMPTS, RESOLVED, assert_chosen, assert_logprobs

NEW_TOKENS = 9


GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)


@pytest.fixture(params=["cpu", GPU])
def model(request: pytest.FixtureRequest, saved_model: Callable[[str], str]) -> NativeModel:
    """On a GPU steps are captured, so the second stage acts on what a graph leaves."""
    return native_model(saved_model("qwen3_moe"), device=request.param, graphs=request.param == "cuda")


class Run(Recording):
    """A recording with log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.logprobs: dict[int, list[TokenLogprobs]] = {}

    def take(self, model: NativeModel, step: StepPlan) -> None:
        """Run a step and note what it gave."""
        new = model.launch(step)
        self.note(model, new())
        for sequence, logprobs in new.logprobs.items():
            self.logprobs.setdefault(sequence, []).append(logprobs)


def run(model: NativeModel, numbers: Sequence[int], before: dict[int, list[int]] | None = None) -> Run:
    """Admit requests, two at a time while the others decode, until all have their tokens.

    Requests that have tokens from ``before`` go on from there.
    """
    found, waiting, given = Run(), list(numbers), before or {}
    while waiting or model.running:
        joining, waiting = waiting[:2], waiting[2:]
        admissions = []
        for number in joining:
            old = given.get(number, [])
            pages = [2 * number, 2 * number + 1]
            admissions.append(Admission(number, [*PROMPTS[number], *old], 0, RESOLVED[number], len(old), pages))
        feed = [Piece(admission.sequence, 0, len(admission.tokens)) for admission in admissions]
        found.take(model, StepPlan(admit=admissions, feed=feed))
        retire(model, [n for n in model.running if len(found.tokens[n]) + len(given.get(n, [])) >= NEW_TOKENS])
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
