"""A linear layer for few tokens, which costs the reading of its weights.

Shape legend: T tokens, D input width, N output width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from kernels.skinny_linear.reference import skinny_linear_reference

__all__ = ["skinny_linear", "skinny_linear_reference"]

MOST_TOKENS = 4  # from more on the library's matrix product is as fast
MOST_COLUMNS = 8192  # of the input, which a program keeps in registers


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias``, with float32 sums that are rounded once.

    On a GPU a step of few tokens fetches its weights while the kernel before it still runs; more tokens, or a wider
    input, go to `torch.nn.functional.linear`.

    Args:
        x: bfloat16, float16 or float32 ``[T, D]``.
        weight: of the dtype of ``x`` ``[N, D]``.
        bias: of the dtype of ``x`` ``[N]``, or None.
        dtype: of the result, that of ``x`` or float32; None for that of ``x``.

    Returns:
        ``[T, N]`` of ``dtype``.
    """
    dtype = dtype or x.dtype
    if not x.is_cuda:
        return skinny_linear_reference(x, weight, bias, dtype)
    if not 0 < x.shape[0] <= MOST_TOKENS or x.shape[1] > MOST_COLUMNS or not weight.is_contiguous():
        if dtype == x.dtype:
            return linear(x, weight, bias)
        product = torch.mm(x, weight.t(), out_dtype=dtype)
        return product if bias is None else product + bias
    from kernels.skinny_linear.kernel import skinny_linear_triton

    return skinny_linear_triton(x, weight, bias, dtype)
