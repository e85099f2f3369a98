"""The recorder against an independent record: one prompt at a time, unpadded, read where the router's choice arrives.

The reference patches the experts' class instead of hooking the module, drives the model with a loop of its own instead
of ``generate``, and sorts in numpy. Where a router returns its logits, its choice is checked against them as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from profiler.recorder import record_routes
from profiler.seam import find_moe_layers
from tests.support.tiny_models import FAMILIES, VOCAB_SIZE, tiny_model

PROMPT_LENGTHS = (9, 1, 4, 12, 4, 7)
MAX_NEW_TOKENS = 6
# Softmax (or sigmoid) of the logits and nothing else decides: no bias, no groups, no masking between choices.
PLAIN_ROUTERS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "minimax",
    "jamba",
    "qwen3_next",
)
PLAIN_ROUTERS += ("qwen3_5_moe", "hunyuan_v1_moe", "flex_olmo")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_prompts(seed: int = 3) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]


@contextmanager
def calls_of_experts(model: torch.nn.Module) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """(indices, weights) of every call of an experts module, in order, by a patched class."""
    experts_class = next(type(module) for name, module in model.named_modules() if name.endswith(".experts"))
    original = experts_class.forward
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def forward(self: torch.nn.Module, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> Any:
        calls.append((indices.numpy().copy(), weights.float().numpy().copy()))
        return original(self, hidden, indices, weights)

    experts_class.forward = forward
    try:
        yield calls
    finally:
        experts_class.forward = original


@contextmanager
def logits_of_routers(model: Any) -> Iterator[list[np.ndarray]]:
    """Logits [T, E] of every call of a router, in order."""
    num_experts = find_moe_layers(model)[0].num_experts
    logits: list[np.ndarray] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        # Older releases of Transformers have routers that return the logits alone, or in another place.
        outputs = output if isinstance(output, tuple) else (output,)
        found = [out for out in outputs if isinstance(out, torch.Tensor) and out.shape[1:] == (num_experts,)]
        assert len(found) == 1
        logits.append(found[0].numpy().copy())

    routers = [m for name, m in model.named_modules() if name.rpartition(".")[2] in ("gate", "router")]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_alone(model: Any, prompt: list[int], max_new_tokens: int, ends: tuple[int, ...]) -> list[int]:
    """Greedy decoding of one prompt; returns the tokens that were fed."""
    fed = list(prompt)
    output = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(max_new_tokens - 1):
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            break
        fed.append(token)
        output = model(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
    return fed


def join_calls(calls: list[Any], num_layers: int) -> np.ndarray:
    """[T, L, K] from one array per call, layer after layer, forward pass after forward pass."""
    return np.stack([np.concatenate(calls[layer::num_layers]) for layer in range(num_layers)], axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_trace_equals_one_prompt_at_a_time(family: str) -> None:
    model = tiny_model(family)
    prompts = make_prompts()
    ends = (int(model.generation_config.eos_token_id),)
    records = list(record_routes(model, prompts, batch_size=4, max_new_tokens=MAX_NEW_TOKENS))
    assert len(records) == len(prompts)
    num_layers = records[0].experts.shape[1]
    for prompt, record in zip(prompts, records, strict=True):
        with calls_of_experts(model) as calls:
            fed = run_alone(model, prompt, MAX_NEW_TOKENS, ends)
        indices = join_calls([call[0] for call in calls], num_layers)
        weights = join_calls([call[1] for call in calls], num_layers)
        order = np.argsort(-weights, axis=-1, kind="stable")
        assert record.token_ids.tolist() == fed
        assert record.decode.tolist() == [False] * len(prompt) + [True] * (len(fed) - len(prompt))
        np.testing.assert_array_equal(record.experts, np.take_along_axis(indices, order, axis=-1))
        expected = np.take_along_axis(weights, order, axis=-1)
        np.testing.assert_allclose(record.weights.astype(np.float32), expected, rtol=2e-3, atol=1e-4)
    every = np.concatenate([record.experts for record in records])
    assert all(len(np.unique(every[:, layer])) >= 4 for layer in range(num_layers)), "routing is not diverse"


@pytest.mark.parametrize("family", PLAIN_ROUTERS)
def test_trace_equals_the_top_k_of_the_router_logits(family: str) -> None:
    model = tiny_model(family)
    prompts = make_prompts()
    records = list(record_routes(model, prompts, batch_size=6, max_new_tokens=MAX_NEW_TOKENS))
    _, num_layers, top_k = records[0].experts.shape
    for prompt, record in zip(prompts, records, strict=True):
        with logits_of_routers(model) as logits:
            run_alone(model, prompt, MAX_NEW_TOKENS, (int(model.generation_config.eos_token_id),))
        order = np.argsort(-join_calls(logits, num_layers), axis=-1, kind="stable")
        np.testing.assert_array_equal(record.experts, order[..., :top_k])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_chunked_prefill_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    prompts = make_prompts()
    whole = list(record_routes(model, prompts, batch_size=3, max_new_tokens=3))
    model.generation_config.prefill_chunk_size = 5
    chunked = list(record_routes(model, prompts, batch_size=3, max_new_tokens=3))
    for left, right in zip(whole, chunked, strict=True):
        np.testing.assert_array_equal(left.experts, right.experts)
        np.testing.assert_array_equal(left.decode, right.decode)
