"""Triton kernel of residual addition, RMSNorm and a linear layer: one program per output, each takes the whole norm.

That repeats a norm of a few kilobytes out of L2 in every program and saves a launch and the wait for it.

Shape legend: T tokens, D model width, N outputs of the linear layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two

NUMBERS_PER_WARP = 1024
LEAST_WARPS, MOST_WARPS = 8, 16


@triton.jit(do_not_specialize=["num_tokens"])
def norm_linear_kernel(
    x,
    residual,
    norm_weight,
    weight,
    bias,
    total,
    normed,
    out,
    num_tokens,
    eps,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One output of all tokens; the first programs store a token's sum and norm each."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    output, num_outputs = tl.program_id(0), tl.num_programs(0)
    tokens, columns = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    inside = columns < D
    weights_D = tl.load(weight + output.to(tl.int64) * D + columns, mask=inside, other=0.0)
    scale_D = tl.load(norm_weight + columns, mask=inside, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    place_TD = tokens[:, None] * D + columns[None, :]
    inside_TD = (tokens < num_tokens)[:, None] & inside[None, :]
    value_TD = tl.load(x + place_TD, mask=inside_TD, other=0.0)
    added_TD = tl.load(residual + place_TD, mask=inside_TD, other=0.0)
    value_TD = (value_TD.to(tl.float32) + added_TD.to(tl.float32)).to(value_TD.dtype)
    wide_TD = value_TD.to(tl.float32)
    inverse_T = tl.rsqrt(tl.sum(wide_TD * wide_TD, axis=1) / D + eps)
    normed_TD = (wide_TD * inverse_T[:, None] * scale_D.to(tl.float32)[None, :]).to(value_TD.dtype)
    stored_TD = (tokens % num_outputs == output)[:, None] & inside_TD
    tl.store(total + place_TD, value_TD, mask=stored_TD)
    tl.store(normed + place_TD, normed_TD, mask=stored_TD)
    result_T = tl.sum(normed_TD.to(tl.float32) * weights_D.to(tl.float32)[None, :], axis=1)
    if bias is not None:
        result_T += tl.load(bias + output).to(tl.float32)
    tl.store(out + tokens * num_outputs + output, result_T.to(out.dtype.element_ty), mask=tokens < num_tokens)


def norm_linear_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `norm_linear` computes for a few tokens, at least one; the same arguments and results."""
    tokens, width = x.shape
    x = x.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    out = x.new_empty((tokens, len(weight)), dtype=dtype or x.dtype)
    block_tokens, block_width = power_of_two(tokens), power_of_two(width)
    norm_linear_kernel[(len(weight),)](
        x,
        residual.contiguous(),
        norm_weight,
        weight,
        bias,
        total,
        normed,
        out,
        tokens,
        eps,
        D=width,
        BLOCK_T=block_tokens,
        BLOCK_D=block_width,
        num_warps=min(max(block_tokens * block_width // NUMBERS_PER_WARP, LEAST_WARPS), MOST_WARPS),
        **overlap(x),
    )
    return total, normed, out
