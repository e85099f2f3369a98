"""A matrix of its own for every head, which latent attention applies to queries and results.

Shape legend: T tokens, H heads, K input size, N output size.
"""

from __future__ import annotations

import torch

from kernels.head_linear.reference import head_linear_reference

__all__ = ["head_linear", "head_linear_reference"]

MOST_TOKENS = 4  # more go to the library's batched product
MOST_ROWS = 1024  # of a matrix: a program has them all in registers


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every head's vector times its matrix, with float32 sums that are rounded once.

    On a GPU a step of few tokens fetches the matrices while the kernel before it still runs.

    Args:
        x: bfloat16, float16 or float32 ``[T, H, K]``, entries of a head contiguous.
        weight: of the dtype of ``x`` ``[H, K, N]``; rows or columns contiguous, as a view of a projection has them.

    Returns:
        ``[T, H, N]``, contiguous, of the dtype of ``x``.
    """
    if not x.is_cuda:
        return head_linear_reference(x, weight)
    if not 0 < x.shape[0] <= MOST_TOKENS or weight.shape[1] > MOST_ROWS:
        out = x.new_empty((*x.shape[:2], weight.shape[2]))
        torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
        return out
    from kernels.head_linear.kernel import head_linear_triton

    return head_linear_triton(x, weight)
