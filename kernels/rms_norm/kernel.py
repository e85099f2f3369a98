"""Triton kernel of residual addition and RMSNorm: one program per row, which stays in registers.

Shape legend: T tokens, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    total,
    normed,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(residual + row + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row + column, value, mask=inside)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
    tl.store(normed + row + column, (wide * inverse * scale).to(value.dtype), mask=inside)


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_rms_norm` computes, on a GPU or in the interpreter; the same arguments and results."""
    tokens, width = x.shape
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if tokens:
        block = triton.next_power_of_2(width)
        _add_rms_norm[(tokens,)](
            x,
            x if residual is None else residual.contiguous(),
            weight,
            total,
            normed,
            eps,
            D=width,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(max(block // 512, 1), 16),
            **overlap(x),
        )
    return total, normed
