"""Sampling: frequencies against the softmax, the nucleus, repeatability."""

from __future__ import annotations

import pytest
import torch

from kernels.sample import sample
from kernels.sample.reference import gumbel_noise

DRAWS = 20_000


def draw(logits: torch.Tensor, temperature: float, top_p: float | None = None, seed: int = 11) -> torch.Tensor:
    """Tokens drawn at many positions from the same logits ``[V]``."""
    rows = logits.expand(DRAWS, -1)
    nucleus = None if top_p is None else torch.full((DRAWS,), top_p)
    seeds = torch.full((DRAWS,), seed)
    return sample(rows, torch.full((DRAWS,), temperature), seeds, torch.arange(DRAWS), nucleus)


def assert_drawn_from(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Every token's frequency within five standard deviations of its probability."""
    frequency = torch.bincount(tokens, minlength=len(probabilities)) / DRAWS
    deviation = (probabilities * (1 - probabilities) / DRAWS).sqrt()
    assert ((frequency - probabilities).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 0.5, -torch.inf, 1.0])
    assert_drawn_from(draw(logits, temperature), torch.softmax(logits / temperature, 0))


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [1]), (0.5, [1]), (0.51, [1, 0]), (0.7, [1, 0]), (0.71, [1, 0, 3])])
def test_nucleus_keeps_the_token_that_reaches_the_mass(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.2, 0.5, 0.1, 0.2])  # of the equal ones, the lower id is the likelier
    inside = torch.zeros(4).index_fill(0, torch.tensor(kept), 1.0) * probabilities
    assert_drawn_from(draw(probabilities.log(), 1.0, top_p), inside / inside.sum())


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
    zeros = torch.zeros(2)
    assert sample(logits, zeros, zeros.long(), zeros.long()).tolist() == [1, 0]


def test_tiny_temperature_is_greedy() -> None:
    assert set(draw(torch.tensor([1.0, 2.0, 1.99]), 1e-30).tolist()) == {1}


def test_a_draw_depends_on_nothing_but_its_own_row() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    settings = torch.tensor([0.7, 0.0, 1.0, 2.0]), torch.tensor([3, 3, -5, 2**62]), torch.tensor([0, 1, 2, 3])
    top_p = torch.tensor([0.9, 0.1, 1.0, 0.5])
    together = sample(logits, *settings, top_p)
    for row in range(4):
        only = slice(row, row + 1)
        assert sample(logits[only], *(value[only] for value in settings), top_p[only]) == together[row]


def test_noise_is_gumbel_and_unlike_for_other_seeds_positions_and_tokens() -> None:
    seeds = torch.tensor([1, 2, 1, 1 + 2**40, -1])
    noise = gumbel_noise(seeds, torch.tensor([0, 0, 1, 0, 0]), 50_000)
    assert noise.isfinite().all()
    torch.testing.assert_close(noise.mean(1), torch.full((5,), 0.5772), atol=0.03, rtol=0)
    torch.testing.assert_close(noise.var(1), torch.full((5,), 1.6449), atol=0.06, rtol=0)
    correlation = torch.corrcoef(torch.cat((noise, noise[:1].roll(1, 1)))) - torch.eye(6)
    assert correlation.abs().max() < 0.03


def test_no_rows() -> None:
    nothing = torch.empty(0)
    assert sample(torch.empty(0, 7), nothing, nothing.long(), nothing.long()).shape == (0,)
