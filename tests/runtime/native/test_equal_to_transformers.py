"""The native decoder gives what Transformers gives on the same weights, whatever runs beside a sequence."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from runtime.native.model import NativeModel
from tests.support.native import Recording, admission, decode, drive, native_model, prefill, retire
from tests.support.reference import greedy

NEW_TOKENS = 64
TOLERANCE = 1e-4
DEEPSEEK = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", *DEEPSEEK, "demo")
GENERATOR = random.Random(0)
# Within a page, at its end, at its beginning, over several, and in several pieces of a prefill (24 tokens, page 16).
PROMPTS = [[GENERATOR.randrange(4, 120) for _ in range(length)] for length in (5, 16, 17, 1, 130, 30)]
ARRIVALS = [0, 0, 0, 3, 5, 40]


@cache
def loaded(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits(family: str, saved_model: Callable[[str], str]) -> None:
    path = saved_model(family)
    model = native_model(path, slots=shuffled(path))
    prompts = PROMPTS[1:4] if family == "demo" else PROMPTS  # the demo model is larger
    recording = drive(model, prompts, ARRIVALS, NEW_TOKENS)
    for number, prompt in enumerate(prompts):
        check_equal(recording, number, *greedy(loaded(path), prompt, NEW_TOKENS))


def shuffled(path: str) -> list[int]:
    """Experts in another order than that of their ids."""
    order = list(range(loaded(path).config.num_local_experts if "demo" in path else 8))
    random.Random(1).shuffle(order)
    return order


def check_equal(recording: Recording, number: int, tokens: list[int], logits: torch.Tensor) -> None:
    """Equal up to rounding; the texts may part only where the reference's two best tokens are as good as tied."""
    assert len(recording.tokens[number]) == NEW_TOKENS
    for step, wanted in enumerate(logits.numpy()):
        found = recording.logits[number][step]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=f"prompt {number}, step {step}")
        if recording.tokens[number][step] != tokens[step]:
            best, second = np.sort(wanted)[::-1][:2]
            assert best - second < TOLERANCE
            return


@cache
def kept(path: str) -> NativeModel:
    return native_model(path)


@cache
def alone(path: str, number: int) -> tuple[list[int], torch.Tensor]:
    return greedy(loaded(path), PROMPTS[number], 20)


# "admit" joins so many further prompts, "retire" drops a sequence, "decode" takes a step.
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "retire", "decode", "decode"]), st.integers(1, 3)), min_size=4, max_size=14
)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_any_order_of_joining_and_leaving(
    family: str, operations: list[tuple[str, int]], saved_model: Callable[[str], str]
) -> None:
    path = saved_model(family)
    model = kept(path)
    retire(model, model.running)
    recording = Recording()
    waiting = list(range(len(PROMPTS)))
    for name, argument in [("admit", 2), *operations, ("decode", 0)]:
        if name == "admit" and waiting:
            joining, waiting = waiting[:argument], waiting[argument:]
            recording.note(model, prefill(model, [admission(n, PROMPTS[n], 20) for n in joining]))
        elif name == "retire" and model.running:
            retire(model, [model.running[argument % len(model.running)]])
        elif name == "decode" and model.running:
            recording.note(model, decode(model))
    for number, rows in recording.logits.items():
        tokens, logits = alone(path, number)
        np.testing.assert_allclose(np.stack(rows), logits[: len(rows)].numpy(), rtol=0, atol=TOLERANCE)
        assert recording.tokens[number] == tokens[: len(rows)]
