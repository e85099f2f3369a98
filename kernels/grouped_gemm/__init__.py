"""The experts' two matrix products over all slots of a rank at once.

Shape legend: T tokens, K choices per token, P local slots, D model width, F expert width.
"""

from __future__ import annotations

import torch

from kernels.grouped_gemm.reference import Activation, down_reference, gate_up_reference
from kernels.permute import Permutation

__all__ = ["Activation", "down", "down_reference", "gate_up", "gate_up_reference"]


def gate_up(
    x: torch.Tensor,
    weight: torch.Tensor,
    permutation: Permutation,
    top_k: int,
    activation: Activation = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first product and the gated activation, of every pair with the weights of its slot.

    Args:
        x: the tokens, bfloat16, float16 or float32 ``[T, D]``.
        weight: of the dtype of ``x``, contiguous ``[P, 2F, D]``, the gate's F rows before the up projection's.
        permutation: the pairs of each slot.
        top_k: choices per token K.
        activation: ``silu``: silu(gate) · up. ``gpt_oss``: with gate at most 7 and up within ±7,
            (up + 1) · gate · sigmoid(1.702 · gate).
        bias: of the dtype of ``x`` ``[P, 2F]``, or None.

    Returns:
        ``[T·K, F]`` of the dtype of ``x``, by pair; rows of pairs without a slot here are undefined. Sums are float32,
        and rounded once, after the activation.
    """
    if x.is_cuda:
        from kernels.grouped_gemm.kernel import gate_up_triton

        return gate_up_triton(x, weight, permutation, top_k, activation, bias)
    return gate_up_reference(x, weight, permutation, top_k, activation, bias)


def down(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    permutation: Permutation,
    bias: torch.Tensor | None = None,
    after_gate_up: bool = False,
) -> torch.Tensor:
    """The second product, of every pair with the weights of its slot.

    Args:
        hidden: what `gate_up` gives ``[T·K, F]``.
        weight: of the dtype of ``hidden``, contiguous ``[P, D, F]``.
        permutation: the pairs of each slot.
        bias: of the dtype of ``hidden`` ``[P, D]``, or None.
        after_gate_up: the kernel right before this one on the stream is `gate_up` of the same permutation: on a GPU
            the weights are then fetched while that ends.

    Returns:
        ``[T·K, D]`` of the dtype of ``hidden``, by pair; rows of pairs without a slot here are undefined.
    """
    if hidden.is_cuda:
        from kernels.grouped_gemm.kernel import down_triton

        return down_triton(hidden, weight, permutation, bias, after_gate_up)
    return down_reference(hidden, weight, permutation, bias)
