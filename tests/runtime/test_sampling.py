"""Sampling: the nucleus, the distribution, repeatable draws, and settings that are refused."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from profiler.errors import InputError
from runtime.requests import SamplingParameters
from runtime.sampling import Sampler
from runtime.worker import NO_TOKEN, RankWorker

PROBABILITIES = [0.5, 0.25, 0.15, 0.1]
LOGITS = torch.tensor(PROBABILITIES).log()


def make(temperature: float, top_p: float, seed: int) -> Sampler:
    return Sampler(SamplingParameters(temperature=temperature, top_p=top_p, seed=seed))


def draw(count: int, *, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> Counter[int]:
    sampler = make(temperature, top_p, seed)
    return Counter(sampler(LOGITS) for _ in range(count))


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(1e-300, {0}), (0.49, {0}), (0.51, {0, 1}), (0.76, {0, 1, 2}), (0.91, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})],
)
def test_nucleus(top_p: float, nucleus: set[int]) -> None:
    """The smallest set of the most likely tokens whose mass reaches top_p."""
    assert set(draw(400, top_p=top_p)) == nucleus


def test_nucleus_keeps_the_first_of_equal_tokens() -> None:
    sampler = make(1.0, 0.3, 0)
    assert {sampler(torch.zeros(4)) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 1.0), (1.0, 0.8)])
def test_distribution(temperature: float, top_p: float) -> None:
    """Within five standard deviations of the binomial count."""
    scaled = [p ** (1 / temperature) for p in PROBABILITIES]
    if top_p < 1:
        scaled = [*scaled[:3], 0]
    count = 4000
    found = draw(count, temperature=temperature, top_p=top_p)
    for token, weight in enumerate(scaled):
        p = weight / sum(scaled)
        assert abs(found[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = make(temperature, 1.0, 0)
    assert sampler(torch.tensor([-1e4, 3.0, 2.999, 1e4])) == 3
    assert sampler(torch.tensor([-math.inf, 2.0, 1.0])) == 1


def test_draws_depend_on_the_seed_alone() -> None:
    alone = make(1.0, 0.95, 7)
    expected = [alone(LOGITS) for _ in range(50)]
    mine, other = make(1.0, 0.95, 7), make(1.0, 0.95, 8)
    torch.manual_seed(123)
    together = [(mine(LOGITS), other(LOGITS)) for _ in range(50)]
    assert [first for first, _ in together] == expected
    assert [second for _, second in together] != expected


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_accepted_seed_works(seed: int) -> None:
    assert make(1.0, 1.0, seed)(LOGITS) in range(4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("seed", 2**63),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
    ],
)
def test_what_would_break_a_step_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        SamplingParameters(**{name: value})


def test_logits_that_are_no_numbers_give_no_token() -> None:
    worker = RankWorker.__new__(RankWorker)
    worker.everyone_holds_all = True
    worker.group = SimpleNamespace(rank=0)  # type: ignore[assignment]
    worker._samplers = {row: make(temperature, 1.0, 0) for row, temperature in enumerate([0, 1, 1, 0])}
    logits = torch.tensor([[-math.inf, 1.0], [math.nan, 1.0], [math.inf, 1.0], [math.nan, 1.0]])
    assert worker._sample([0, 1, 2, 3], logits) == {0: 1, 1: NO_TOKEN, 2: NO_TOKEN, 3: NO_TOKEN}
