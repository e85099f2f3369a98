"""Residual addition and RMSNorm against PyTorch's own norm."""

from __future__ import annotations

import pytest
import torch

from kernels.rms_norm import add_rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_reference_is_the_norm_of_the_stored_sum(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(tokens, 48, dtype=dtype), torch.randn(tokens, 48, dtype=dtype), torch.randn(48)
    total, normed = add_rms_norm(x, residual, weight, 1e-5)
    assert total.dtype == normed.dtype == dtype
    torch.testing.assert_close(total, x + residual)
    expected = torch.nn.functional.rms_norm(total.double(), (48,), weight.double(), 1e-5)
    torch.testing.assert_close(normed, expected.to(dtype))


def test_without_residual_the_sum_is_the_input() -> None:
    x = torch.randn(2, 8)
    total, _ = add_rms_norm(x, None, torch.ones(8), 1e-6)
    assert total is x
