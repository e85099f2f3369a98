"""Triton kernel of the experts' products of a few pairs: every pair by itself, without matrix units.

Shape legend: N output columns of a program, D the reduction, B what of it is taken at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.grouped_gemm.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT
from kernels.launch import overlap, power_of_two
from kernels.permute import Permutation


ALPHA = tl.constexpr(GPT_OSS_ALPHA)
LIMIT, LEAST = tl.constexpr(GPT_OSS_LIMIT), tl.constexpr(-GPT_OSS_LIMIT)
MOST_PAIRS = 8


class Lines(NamedTuple):
    """One program's share of a pair's product: output columns, how much of the reduction at a time, warps."""

    columns: int
    depth: int
    warps: int
    rows: int = 1


GATED, PLAIN = Lines(4, 1024, 4), Lines(8, 256, 4)


@triton.jit
def finish(sum_NB, up_NB, bias, out, slot, pair, rows_of_slot, read_N, columns_N, num_columns, ACTIVATION: tl.constexpr):
    """Sum, add biases, activate, store one pair's columns."""
    sum_N = tl.sum(sum_NB, 1)
    up_N = tl.sum(up_NB, 1)
    if bias is not None:
        biases = bias + slot.to(tl.int64) * rows_of_slot + read_N
        sum_N += tl.load(biases).to(tl.float32)
        if ACTIVATION != "none":
            up_N += tl.load(biases + num_columns).to(tl.float32)
    if ACTIVATION == "silu":
        sum_N = sum_N / (1 + tl.exp(-sum_N)) * up_N
    if ACTIVATION == "gpt_oss":
        gate_N = tl.where(sum_N > LIMIT, LIMIT, sum_N)
        up_N = tl.where(up_N > LIMIT, LIMIT, tl.where(up_N < LEAST, LEAST, up_N))
        sum_N = (up_N + 1) * gate_N / (1 + tl.exp(-(gate_N * ALPHA)))
    out_N = out + pair.to(tl.int64) * num_columns + columns_N
    tl.store(out_N, sum_N.to(out.dtype.element_ty), mask=columns_N < num_columns)


@triton.jit
def find_tile(indptr, tile, num_slots, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    slots = tl.arange(0, BLOCK_P)
    start_P = tl.load(indptr + slots, mask=slots < num_slots, other=0)
    end_P = tl.load(indptr + slots + 1, mask=slots < num_slots, other=0)
    tiles_P = (end_P - start_P + ROWS - 1) // ROWS
    upto_P = tl.cumsum(tiles_P, 0)
    slot = tl.sum((upto_P <= tile).to(tl.int32), 0)
    mine_P = slots == slot
    first = tl.sum(tl.where(mine_P, start_P + (tile - upto_P + tiles_P) * ROWS, 0), 0)
    return slot, first, tl.sum(tl.where(mine_P, end_P, 0), 0)


@triton.jit
def pair_kernel(
    x,
    weight,
    bias,
    out,
    order,
    indptr,
    num_slots,
    num_columns,
    D: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some columns of ``x[pair // TOP_K] @ weight[slot].T``, and of the up projection below it where there is one."""
    if OVERLAP == 2:
        tl.extra.cuda.gdc_launch_dependents()
    columns_N = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    read_N = tl.minimum(columns_N, num_columns - 1)
    place = tl.program_id(1)
    slots = tl.arange(0, BLOCK_P)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if OVERLAP == 1:
        tl.extra.cuda.gdc_launch_dependents()
    if ROWS == 1:
        end_P = tl.load(indptr + 1 + slots, mask=slots < num_slots, other=place + 1)
        slot = tl.sum((end_P <= place).to(tl.int32), 0)
        first, end = place, place + 1
    else:
        slot, first, end = find_tile(indptr, place, num_slots, BLOCK_P, ROWS)
    if slot < num_slots:
        pair = tl.load(order + first)
        second = tl.load(order + tl.minimum(first + ROWS, end) - 1)
        rows_of_slot = num_columns * (1 if ACTIVATION == "none" else 2)
        start_N = weight + (slot.to(tl.int64) * rows_of_slot + read_N) * D
        sum_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        gate_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        sum2_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        gate2_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for start in tl.static_range(0, D, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            inside = depth < D
            values = tl.load(x + (pair // TOP_K).to(tl.int64) * D + depth, mask=inside, other=0.0).to(tl.float32)
            weights_NB = tl.load(start_N[:, None] + depth[None, :], mask=inside[None, :], other=0.0).to(tl.float32)
            sum_NB += weights_NB * values[None, :]
            if ROWS == 2:
                values2 = tl.load(x + (second // TOP_K).to(tl.int64) * D + depth, mask=inside, other=0.0).to(tl.float32)
                sum2_NB += weights_NB * values2[None, :]
            if ACTIVATION != "none":
                up_NB = (start_N + num_columns.to(tl.int64) * D)[:, None] + depth[None, :]
                weights_NB = tl.load(up_NB, mask=inside[None, :], other=0.0).to(tl.float32)
                gate_NB += weights_NB * values[None, :]
                if ROWS == 2:
                    gate2_NB += weights_NB * values2[None, :]
        finish(sum_NB, gate_NB, bias, out, slot, pair, rows_of_slot, read_N, columns_N, num_columns, ACTIVATION)
        if ROWS == 2:
            if end > first + 1:
                finish(sum2_NB, gate2_NB, bias, out, slot, second, rows_of_slot, read_N, columns_N, num_columns, ACTIVATION)


def pair_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: Permutation,
    top_k: int,
    activation: str,
    lines: Lines,
) -> torch.Tensor:
    """One of the two products, by pair."""
    num_pairs, num_slots = len(permutation.order), weight.shape[0]
    columns, depth = weight.shape[1] // (1 if activation == "none" else 2), weight.shape[2]
    out = torch.empty((num_pairs, columns), dtype=x.dtype, device=x.device)
    if num_pairs:
        most = min(num_pairs, num_slots)
        most += (num_pairs - most) // lines.rows
        pair_kernel[(triton.cdiv(columns, lines.columns), most)](
            x.contiguous(),
            weight,
            bias,
            out,
            *permutation,
            num_slots,
            columns,
            D=depth,
            TOP_K=top_k,
            ACTIVATION=activation,
            BLOCK_P=power_of_two(num_slots),
            ROWS=lines.rows,
            COLUMNS=lines.columns,
            DEPTH=lines.depth,
            num_warps=lines.warps,
            **overlap(x),
        )
    return out
