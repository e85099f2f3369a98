"""Triton kernels of a linear layer for some tokens, by the matrix units.

The weights depend on no earlier kernel, so they are asked for before this one waits for its input: into L2 where a
program walks over the reduction, into registers where it takes it whole.

Shape legend: T tokens, D input width, N output width, P parts of the reduction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.launch import overlap


class Walk(NamedTuple):
    """Tokens and rows of weights of a program, how much of the reduction it takes at a time, how it is compiled."""

    tokens: int
    rows: int
    depth: int
    warps: int
    stages: int
    prefetch: bool = True


@triton.jit
def ask_for(start, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Let ``BYTES`` from an address on come into L2, every thread of the program ``BYTES / THREADS`` of them."""
    address = start.to(tl.int64) + tl.arange(0, THREADS).to(tl.int64) * (BYTES // THREADS)
    size = tl.full([THREADS], BYTES // THREADS, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def walking_linear(
    x,
    weight,
    bias,
    out,
    num_tokens,
    N,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PREFETCH: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Up to ``TOKENS`` by ``ROWS`` of the output."""
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if PREFETCH:
        if tl.program_id(1) == 0:
            ask_for(weight + tl.program_id(0).to(tl.int64) * (ROWS * D), ROWS * D * 2, THREADS)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, DEPTH)
    x_TD = x + tl.minimum(token, num_tokens - 1).to(tl.int64)[:, None] * D + depth[None, :]
    weight_DN = weight + tl.minimum(row, N - 1).to(tl.int64)[None, :] * D + depth[:, None]
    sum_TN = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, D, DEPTH):
        if D % DEPTH == 0:
            values_TD, weights_DN = tl.load(x_TD), tl.load(weight_DN)
        else:
            left = depth < D - start
            values_TD = tl.load(x_TD, mask=left[None, :], other=0.0)
            weights_DN = tl.load(weight_DN, mask=left[:, None], other=0.0)
        sum_TN = tl.dot(values_TD, weights_DN, sum_TN, input_precision="ieee")
        x_TD += DEPTH
        weight_DN += DEPTH
    if bias is not None:
        sum_TN += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[None, :]
    stored_TN = (token < num_tokens)[:, None] & (row < N)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * N + row[None, :], sum_TN.to(out.dtype.element_ty), mask=stored_TN)


@triton.jit
def whole_linear(
    x,
    weight,
    bias,
    out,
    num_tokens,
    N,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Up to ``TOKENS`` by ``ROWS`` of the output, every warp a part of the reduction."""
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    depth = tl.arange(0, PARTS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    weight_PND = weight + tl.minimum(row, N - 1).to(tl.int64)[None, :, None] * D + depth
    x_PTD = x + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :, None] * D + depth
    if PARTS * DEPTH == D:
        weights_PND = tl.load(weight_PND)
    else:
        weights_PND = tl.load(weight_PND, mask=depth < D, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if PARTS * DEPTH == D:
        values_PTD = tl.load(x_PTD)
    else:
        values_PTD = tl.load(x_PTD, mask=depth < D, other=0.0)
    sum_PNT = tl.dot(weights_PND, tl.permute(values_PTD, (0, 2, 1)), input_precision="ieee")
    sum_NT = tl.sum(sum_PNT, 0)
    if bias is not None:
        sum_NT += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    stored_NT = (token < num_tokens)[None, :] & (row < N)[:, None]
    tl.store(out + token.to(tl.int64)[None, :] * N + row[:, None], sum_NT.to(out.dtype.element_ty), mask=stored_NT)


def walking_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, walk: Walk
) -> torch.Tensor:
    """A linear layer ``[T, N]`` by programs that walk over the reduction."""
    tokens, width = x.shape
    rows_out = weight.shape[0]
    out = x.new_empty((tokens, rows_out))
    threads = 32 * walk.warps
    options = overlap(x)
    share = walk.rows * width * 2 // threads
    prefetch = walk.prefetch and bool(options["OVERLAP"]) and rows_out % walk.rows == 0 and share % 16 == 0
    walking_linear[(triton.cdiv(rows_out, walk.rows), triton.cdiv(tokens, walk.tokens))](
        x.contiguous(),
        weight,
        bias,
        out,
        tokens,
        rows_out,
        D=width,
        TOKENS=walk.tokens,
        ROWS=walk.rows,
        DEPTH=walk.depth,
        PREFETCH=prefetch,
        THREADS=threads,
        num_warps=walk.warps,
        num_stages=walk.stages,
        **options,
    )
    return out


def whole_linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens_of: int = 16, rows: int = 16, parts: int = 8
) -> torch.Tensor:
    """A linear layer ``[T, N]`` by programs that take the reduction whole."""
    tokens, width = x.shape
    rows_out = weight.shape[0]
    out = x.new_empty((tokens, rows_out))
    depth = max(16, triton.next_power_of_2(triton.cdiv(width, parts)))
    whole_linear[(triton.cdiv(rows_out, rows), triton.cdiv(tokens, tokens_of))](
        x.contiguous(),
        weight,
        bias,
        out,
        tokens,
        rows_out,
        D=width,
        TOKENS=tokens_of,
        ROWS=rows,
        PARTS=parts,
        DEPTH=depth,
        num_warps=parts,
        **overlap(x),
    )
    return out
