"""Residual addition, RMSNorm and a linear layer of few outputs, such as a router, in one launch for few tokens.

Shape legend: T tokens, D model width, N outputs of the linear layer.
"""

from __future__ import annotations

import torch

from kernels.rms_norm import add_rms_norm
from kernels.skinny_linear import skinny_linear

__all__ = ["norm_linear"]

MOST_TOKENS = 8
MOST_NUMBERS = 32768  # of all tokens' rows, which every program keeps in registers


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `add_rms_norm` and then `skinny_linear` of the norm give, up to the order of their sums.

    Args:
        x: a layer part's output, bfloat16, float16 or float32 ``[T, D]``.
        residual: what it is added to, like ``x``.
        norm_weight: scale of the norm ``[D]``, of the dtype of ``x`` or float32.
        eps: added to the mean square.
        weight: of the dtype of ``x``, contiguous ``[N, D]``.
        bias: of the dtype of ``x`` ``[N]``, or None.
        dtype: of the linear layer's result, that of ``x`` or float32; None for that of ``x``.

    Returns:
        The sum ``[T, D]``, its norm ``[T, D]``, both of the dtype of ``x``, and the linear layer of the norm as it is
        stored, ``[T, N]`` of ``dtype``. Sums are float32 and rounded once.
    """
    tokens, width = x.shape
    if x.is_cuda and 0 < tokens <= MOST_TOKENS and tokens * width <= MOST_NUMBERS:
        from kernels.norm_linear.kernel import norm_linear_triton

        return norm_linear_triton(x, residual, norm_weight, eps, weight, bias, dtype)
    total, normed = add_rms_norm(x, residual, norm_weight, eps)
    return total, normed, skinny_linear(normed, weight, bias, dtype)
