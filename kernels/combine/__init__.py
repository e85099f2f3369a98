"""Combination: the weighted sum of a token's experts, the residual addition and the next layer's norm in one pass.

Shape legend: T tokens, K choices per token, D model width.
"""

from __future__ import annotations

import torch

from kernels.combine.reference import combine_reference
from kernels.route import Routes

__all__ = ["combine", "combine_reference"]


def combine(
    pairs: torch.Tensor,
    routes: Routes,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each token's pairs by weight, add the shared experts' output and the residual, and normalise.

    Args:
        pairs: what the second product gives, bfloat16, float16 or float32 ``[T·K, D]``; rows of pairs without a slot
            here count as zero, whatever they hold.
        routes: slots and weights of the pairs.
        shared: output of experts that serve every token, like ``pairs`` ``[T, D]``, or None.
        residual: like ``pairs`` ``[T, D]``.
        norm_weight: scale of the next norm ``[D]``, of the dtype of ``pairs`` or float32.
        eps: added to the mean square.

    Returns:
        The new residual ``[T, D]`` and its norm ``[T, D]``, both of the dtype of ``pairs``. The sum is float32 in the
        order choice 0 … K - 1, shared, residual, and rounded once; the norm is computed of the sum as it is stored.
    """
    if pairs.is_cuda:
        from kernels.combine.kernel import combine_triton

        return combine_triton(pairs, routes, shared, residual, norm_weight, eps)
    return combine_reference(pairs, routes, shared, residual, norm_weight, eps)
