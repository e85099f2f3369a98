"""Residual addition and RMSNorm in one pass.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import torch

from kernels.rms_norm.reference import add_rms_norm_reference

__all__ = ["add_rms_norm", "add_rms_norm_reference"]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the residual and normalise the sum by its root mean square.

    Args:
        x: a layer part's output, bfloat16, float16 or float32 ``[T, D]``.
        residual: what it is added to, like ``x``; None where the stream starts, and then ``x`` is the sum.
        weight: scale of the norm ``[D]``, of the dtype of ``x`` or float32.
        eps: added to the mean square.

    Returns:
        The sum ``[T, D]`` (``x`` itself where there is no residual) and its norm ``[T, D]``, both of the dtype of
        ``x``. The norm is computed in float32 of the sum as it is stored, and rounded once.
    """
    if x.is_cuda:
        from kernels.rms_norm.kernel import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)
