"""Triton kernel of a linear layer for few tokens: every program takes a few rows of weights whole.

The weights depend on no earlier kernel, so they are on their way before this one waits for its input.

Shape legend: T tokens, D input width, N output width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap

ENOUGH_PROGRAMS = 1024  # several per multiprocessor, so that each has loads in flight while others sum


@triton.jit
def _skinny_linear(
    x,
    weight,
    bias,
    out,
    N,
    D: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < D
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    tile = tl.load(weight + place, mask=(row < N)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for token in tl.static_range(T):
        value = tl.load(x + token * D + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tile * value[None, :], axis=1)
        if BIAS:
            total += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
        tl.store(out + token * N + row, total.to(out.dtype.element_ty), mask=row < N)


def skinny_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What `skinny_linear` computes, on a GPU or in the interpreter; the same arguments and results."""
    tokens, width = x.shape
    rows_out = weight.shape[0]
    out = x.new_empty((tokens, rows_out), dtype=dtype or x.dtype)
    block = triton.next_power_of_2(width)
    rows = 4
    while rows > 1 and (triton.cdiv(rows_out, rows) < ENOUGH_PROGRAMS or rows * block > 16384):
        rows //= 2
    _skinny_linear[(triton.cdiv(rows_out, rows),)](
        x.contiguous(),
        weight,
        weight if bias is None else bias,
        out,
        rows_out,
        D=width,
        T=tokens,
        ROWS=rows,
        BLOCK=block,
        BIAS=bias is not None,
        num_warps=4,
        **overlap(x),
    )
    return out
