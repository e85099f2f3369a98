"""The combination: the reference against sums by hand, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.combine import combine
from kernels.route import Routes


@pytest.mark.parametrize("with_shared", [False, True])
def test_reference_in_double(with_shared: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, top_k, width = 5, 3, 24
    pairs = torch.randn(tokens * top_k, width, generator=generator)
    slots = torch.randint(-1, 4, (tokens, top_k), generator=generator, dtype=torch.int32)
    assert (slots < 0).any()
    pairs[slots.flatten() < 0] = torch.nan  # nobody computed these
    weights = torch.rand(tokens, top_k, generator=generator)
    residual, shared = torch.randn(2, tokens, width, generator=generator)
    norm = torch.randn(width, generator=generator)
    given = shared if with_shared else None
    total, normed = combine(pairs, Routes(slots, slots, weights), given, residual, norm, 1e-5)
    expected = residual.double() + (shared.double() if with_shared else 0)
    for token in range(tokens):
        for choice in range(top_k):
            if slots[token, choice] >= 0:
                expected[token] += weights[token, choice].double() * pairs[token * top_k + choice].double()
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    scaled = torch.nn.functional.rms_norm(expected, (width,), norm.double(), 1e-5)
    torch.testing.assert_close(normed.double(), scaled, atol=1e-5, rtol=1e-5)


def test_norm_is_of_the_stored_sum() -> None:
    residual = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    routes = Routes(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1))
    pairs = torch.full((1, 2), 2.0**-9, dtype=torch.bfloat16)  # lost when the sum is stored
    total, normed = combine(pairs, routes, None, residual, torch.ones(2, dtype=torch.bfloat16), 0.0)
    assert torch.equal(total, residual)
    torch.testing.assert_close(normed.float(), torch.tensor([[1.0, 3.0]]) / 5**0.5, atol=0, rtol=2**-8)
