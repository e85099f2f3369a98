"""Triton kernel of a matrix for every head: a program takes all rows of some columns of one matrix.

The matrices depend on no earlier kernel, so they are on their way before this one waits for its input.

Shape legend: T tokens, H heads, K input size, N output size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap

TILE = 8192  # numbers of a matrix that a program keeps in registers


@triton.jit
def _head_linear(
    x,
    weight,
    out,
    N,
    token_stride,
    head_stride,
    matrix_stride,
    row_stride,
    column_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = row[:, None] * row_stride + column[None, :] * column_stride
    inside = (row < K)[:, None] & (column < N)[None, :]
    tile = tl.load(weight + head * matrix_stride + place, mask=inside, other=0.0).to(tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for token in tl.static_range(T):
        value = tl.load(x + token * token_stride + head * head_stride + row, mask=row < K, other=0.0).to(tl.float32)
        total = tl.sum(tile * value[:, None], axis=0)
        tl.store(out + (token * H + head) * N + column, total.to(out.dtype.element_ty), mask=column < N)


def head_linear_triton(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `head_linear` computes, on a GPU or in the interpreter; the same arguments and results."""
    tokens, heads, size = x.shape
    columns = weight.shape[2]
    out = x.new_empty((tokens, heads, columns))
    block = triton.next_power_of_2(size)
    width = max(1, TILE // block)
    _head_linear[(triton.cdiv(columns, width), heads)](
        x,
        weight,
        out,
        columns,
        *x.stride()[:2],
        *weight.stride(),
        H=heads,
        K=size,
        T=tokens,
        BLOCK_K=block,
        BLOCK_N=width,
        num_warps=4,
        **overlap(x),
    )
    return out
