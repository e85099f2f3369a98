"""Triton kernel of the combination: one program per token keeps the whole row for the norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two
from kernels.route import Routes


@triton.jit
def combine_kernel(
    pairs,
    slots,
    weights,
    shared,
    residual,
    norm_weight,
    total,
    normed,
    width,
    eps,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sum in the order choice 0 … K - 1, shared, residual; then normalise what was stored."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    scale = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)  # no kernel wrote it
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    row = token * width + columns
    summed = tl.zeros([BLOCK_D], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        here = tl.load(slots + pair) >= 0
        values = tl.load(pairs + pair * width + columns, mask=inside & here, other=0.0)
        summed += tl.load(weights + pair) * values.to(tl.float32)
    if shared is not None:
        summed += tl.load(shared + row, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)
    stored = summed.to(total.dtype.element_ty)
    tl.store(total + row, stored, mask=inside)
    wide = stored.to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(normed + row, (wide * inverse * scale).to(normed.dtype.element_ty), mask=inside)


def combine_triton(
    pairs: torch.Tensor,
    routes: Routes,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `combine` computes; the same arguments and results."""
    tokens, width = residual.shape
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    if tokens:
        block = power_of_two(width)
        combine_kernel[(tokens,)](
            pairs,
            routes.slots,
            routes.weights,
            shared,
            residual,
            norm_weight,
            total,
            normed,
            width,
            eps,
            TOP_K=routes.slots.shape[1],
            BLOCK_D=block,
            num_warps=max(1, min(16, block // 256)),
            **overlap(residual),
        )
    return total, normed
