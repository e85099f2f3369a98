"""Triton kernel of the experts' products for few pairs: every pair by itself, without the matrix units.

Where hardly any two pairs share a slot, a tile of 16 rows is mostly empty. Here a program multiplies one pair's row
with a few rows of weights, so that there are many small programs: more loads in flight, and a short end.

Shape legend: N output columns of a program, D the reduction, B what of it is taken at a time, P local slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.grouped_gemm.activation import activated
from kernels.grouped_gemm.tiles import Lines
from kernels.launch import overlap, power_of_two
from kernels.permute import Permutation


@triton.jit(do_not_specialize=["num_slots"])
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
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some columns of ``x[pair // TOP_K] @ weight[slot].T``, and of the up projection below it where there is one."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0)  # pairs of one slot are neighbours, so that the second reads the weights from L2
    slots = tl.arange(0, BLOCK_P)
    end_P = tl.load(indptr + 1 + slots, mask=slots < num_slots, other=place + 1)
    pair = tl.load(order + place)
    slot = tl.sum((end_P <= place).to(tl.int32), 0)
    if slot < num_slots:
        columns_N = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        read_N = tl.minimum(columns_N, num_columns - 1)  # columns behind the end repeat the last, for nobody
        rows_of_slot = num_columns * (1 if ACTIVATION == "none" else 2)
        line_N = weight + (slot.to(tl.int64) * rows_of_slot + read_N) * D
        row = x + (pair // TOP_K).to(tl.int64) * D
        sum_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        up_NB = tl.zeros([COLUMNS, DEPTH], tl.float32)
        for start in tl.static_range(0, D, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            inside = depth < D
            values_B = tl.load(row + depth, mask=inside, other=0.0).to(tl.float32)
            weights_NB = tl.load(line_N[:, None] + depth[None, :], mask=inside[None, :], other=0.0)
            sum_NB += weights_NB.to(tl.float32) * values_B[None, :]
            if ACTIVATION != "none":
                below_N = line_N + num_columns.to(tl.int64) * D
                weights_NB = tl.load(below_N[:, None] + depth[None, :], mask=inside[None, :], other=0.0)
                up_NB += weights_NB.to(tl.float32) * values_B[None, :]
        sum_N = tl.sum(sum_NB, 1)
        up_N = tl.sum(up_NB, 1)
        if bias is not None:
            biases = bias + slot.to(tl.int64) * rows_of_slot + read_N
            sum_N += tl.load(biases).to(tl.float32)
            if ACTIVATION != "none":
                up_N += tl.load(biases + num_columns).to(tl.float32)
        sum_N = activated(sum_N, up_N, ACTIVATION)
        out_N = out + pair.to(tl.int64) * num_columns + columns_N
        tl.store(out_N, sum_N.to(out.dtype.element_ty), mask=columns_N < num_columns)


def pair_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: Permutation,
    top_k: int,
    activation: str,
    lines: Lines,
) -> torch.Tensor:
    """One of the two products, by pair; ``activation`` is ``none`` for the second."""
    num_pairs, num_slots = len(permutation.order), weight.shape[0]
    columns, depth = weight.shape[1] // (1 if activation == "none" else 2), weight.shape[2]
    out = torch.empty((num_pairs, columns), dtype=x.dtype, device=x.device)
    if num_pairs:
        pair_kernel[(num_pairs, triton.cdiv(columns, lines.columns))](
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
            COLUMNS=lines.columns,
            DEPTH=lines.depth,
            num_warps=lines.warps,
            **overlap(x),
        )
    return out
