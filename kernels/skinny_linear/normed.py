"""Triton kernel of residual addition, RMSNorm and a linear layer of few outputs, for few tokens.

Shape legend: T tokens, D model width, N output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap


@triton.jit
def normed_linear(
    x,
    residual,
    norm_weight,
    weight,
    bias,
    total,
    normed,
    out,
    N,
    eps,
    D: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One output of every token; every program takes the norm, the first ones store it."""
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    line = tl.load(weight + row.to(tl.int64) * D + column, mask=inside, other=0.0)
    scale = tl.load(norm_weight + column, mask=inside, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    for token in tl.static_range(T):
        value = tl.load(x + token * D + column, mask=inside, other=0.0)
        added = tl.load(residual + token * D + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        wide = value.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / D + eps)
        result = (wide * inverse * scale.to(tl.float32)).to(value.dtype)
        if row == token:
            tl.store(total + token * D + column, value, mask=inside)
            tl.store(normed + token * D + column, result, mask=inside)
        logit = tl.sum(line.to(tl.float32) * result.to(tl.float32), axis=0)
        if bias is not None:
            logit += tl.load(bias + row).to(tl.float32)
        tl.store(out + token * N + row, logit.to(out.dtype.element_ty))


def normed_linear_triton(x, residual, norm_weight, eps, weight, bias):
    tokens, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    out = x.new_empty((tokens, len(weight)))
    normed_linear[(len(weight),)](
        x, residual, norm_weight, weight, bias, total, normed, out, len(weight), eps,
        D=width, T=tokens, BLOCK=triton.next_power_of_2(width), num_warps=8, **overlap(x))
    return total, normed, out
