"""Served by a plan, on several ranks, every model gives what Transformers gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from profiler.seam import find_moe_layers
from tests.support.plans import KINDS, make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.reference import greedy

NEW_TOKENS = 64
TOLERANCE = 1e-4
FAMILIES = ("demo", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next")
RANKS = (1, 2, 4)
EXCHANGES = ("allreduce", "alltoall")
PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [77], [64, 3, 99, 98]]
ARRIVALS = [0, 0, 0, 3, 5]

CASES = [
    (family, kind, RANKS[(f + k) % 3], EXCHANGES[(f + k // 2 + k) % 2])
    for (f, family), (k, kind) in itertools.product(enumerate(FAMILIES), enumerate(KINDS))
]


@dataclass(frozen=True)
class Reference:
    tokens: list[int]
    logits: np.ndarray  # [new tokens, V]


@cache
def reference(model_path: str, prompt: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Reference:
    """What Transformers generates for one prompt alone, greedily and beyond any end-of-sequence token."""
    tokens, logits = greedy(loaded(model_path, dtype), list(prompt), NEW_TOKENS)
    return Reference(tokens, logits.numpy())


@cache
def loaded(model_path: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()


def test_the_cases_cover_every_pair() -> None:
    factors = (FAMILIES, KINDS, RANKS, EXCHANGES)
    for first, second in itertools.combinations(range(4), 2):
        covered = {(case[first], case[second]) for case in CASES}
        assert covered == set(itertools.product(factors[first], factors[second]))


@pytest.mark.parametrize(("family", "kind", "ranks", "exchange"), CASES)
def test_greedy_tokens_and_logits(
    family: str,
    kind: str,
    ranks: int,
    exchange: str,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
) -> None:
    path = saved_model(family)
    plan = make_plan(path, kind, ranks, exchange, seed=KINDS.index(kind))
    results = rank_pool(ranks).run(Job(path, plan.to_dict(), exchange, PROMPTS, ARRIVALS, NEW_TOKENS))
    for rank, result in enumerate(results):
        own = sum(len(gpus[rank]) for gpus in plan.slots) / (len(plan.slots) * plan.num_experts)
        whole = expert_bytes(path)
        assert result.expert_parameter_bytes == pytest.approx(own * whole), "a rank holds just the experts of its slots"
        assert result.tokens == results[0].tokens, "every rank knows every token"
    logits = {number: rows for result in results for number, rows in result.logits.items()}
    for number, prompt in enumerate(PROMPTS):
        expected = reference(path, tuple(prompt))
        check_equal(results[0].tokens[number], np.stack(logits[number]), expected)


def check_equal(tokens: list[int], logits: np.ndarray, expected: Reference) -> None:
    """Equal up to rounding; the texts may part only where the reference's two best tokens are as good as tied."""
    assert len(tokens) == NEW_TOKENS
    for step, (token, wanted) in enumerate(zip(tokens, expected.tokens, strict=True)):
        np.testing.assert_allclose(logits[step], expected.logits[step], rtol=0, atol=TOLERANCE, err_msg=f"step {step}")
        if token != wanted:
            best, second = np.sort(expected.logits[step])[::-1][:2]
            assert best - second < TOLERANCE, f"step {step}: {token} instead of {wanted} at a margin of {best - second}"
            return


@cache
def expert_bytes(path: str) -> int:
    model = loaded(path, torch.float32)
    return sum(p.nbytes for layer in find_moe_layers(model) for p in layer.experts.parameters())


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_routes_are_those_of_transformers(
    exchange: str, rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    """In float32 on a CPU not one route differs, token by token."""
    path = saved_model("qwen3_moe")
    plan = make_plan(path, "replicated", 2, exchange)
    [result, other] = rank_pool(2).run(Job(path, plan.to_dict(), exchange, [PROMPTS[2]], [0], NEW_TOKENS))
    expected = reference_routes(path, PROMPTS[2] + result.tokens[0][:-1])
    assert len(result.routes) == len(plan.layer_ids)
    for layer, routes in result.routes.items():
        np.testing.assert_array_equal(np.sort(np.concatenate(routes)), np.sort(expected[layer]))
    if exchange == "allreduce":
        for layer, routes in other.routes.items():
            np.testing.assert_array_equal(np.concatenate(routes), np.concatenate(result.routes[layer]))


def reference_routes(path: str, tokens: list[int]) -> list[np.ndarray]:
    model = loaded(path, torch.float32)
    seen: list[np.ndarray] = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].numpy()))
        for layer in find_moe_layers(model)
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "demo"])
def test_on_two_gpus(family: str, exchange: str, gpu_pool: RankPool, saved_model: Callable[[str], str]) -> None:
    """Over NCCL and with grouped matrix products, in float32."""
    path = saved_model(family)
    plan = make_plan(path, "replicated", 2, exchange)
    results = gpu_pool.run(Job(path, plan.to_dict(), exchange, PROMPTS, ARRIVALS, NEW_TOKENS))
    logits = {number: rows for result in results for number, rows in result.logits.items()}
    for number, prompt in enumerate(PROMPTS):
        check_equal(results[0].tokens[number], np.stack(logits[number]), reference(path, tuple(prompt)))


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[RankPool]:
    pool = RankPool(2, "cuda")
    yield pool
    pool.close()
