"""Triton kernel of the experts' products: each program finds its own tile, so the grid is known without the routes.

Shape legend: M pairs of a row tile, N output columns of a tile, D the reduction, P local slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.grouped_gemm.activation import activated
from kernels.grouped_gemm.pairs import pair_product
from kernels.grouped_gemm.reference import Activation
from kernels.grouped_gemm.tiles import Lines, Tiles, choose_lines, choose_tiles, row_tiles
from kernels.launch import overlap, power_of_two
from kernels.permute import Permutation


@triton.jit
def find_tile(indptr, tile, num_slots, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    """Slot, first pair and end of a row tile; the slot is at least ``num_slots`` where there is no such tile."""
    slots = tl.arange(0, BLOCK_P)
    start_P = tl.load(indptr + slots, mask=slots < num_slots, other=0)
    end_P = tl.load(indptr + slots + 1, mask=slots < num_slots, other=0)
    tiles_P = (end_P - start_P + ROWS - 1) // ROWS
    upto_P = tl.cumsum(tiles_P, 0)
    slot = tl.sum((upto_P <= tile).to(tl.int32), 0)
    mine_P = slots == slot
    first = tl.sum(tl.where(mine_P, start_P + (tile - upto_P + tiles_P) * ROWS, 0), 0)
    return slot, first, tl.sum(tl.where(mine_P, end_P, 0), 0)


@triton.jit(do_not_specialize=["num_slots", "group"])
def product_kernel(
    x,
    weight,
    bias,
    out,
    order,
    indptr,
    num_slots,
    num_columns,
    num_depth,
    group,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,
    BULK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of ``x[pair // TOP_K] @ weight[slot].T``, and of the up projection below it where there is one."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    blocks = tl.cdiv(num_columns, COLUMNS)
    inside_group = tl.program_id(0) % (group * blocks)
    tile = tl.program_id(0) // (group * blocks) * group + inside_group % group
    column = inside_group // group * COLUMNS
    slot, first, end = find_tile(indptr, tile, num_slots, BLOCK_P, ROWS)
    if slot < num_slots:
        rows = first + tl.arange(0, ROWS)
        pairs_M = tl.load(order + rows, mask=rows < end, other=0)  # rows behind the end compute pair 0, for nobody
        columns_N = column + tl.arange(0, COLUMNS)
        read_N = tl.minimum(columns_N, num_columns - 1)  # columns behind the end repeat the last, for nobody
        depth = tl.arange(0, DEPTH)
        x_MD = x + (pairs_M // TOP_K).to(tl.int64)[:, None] * num_depth + depth[None, :]
        row = slot * num_columns * (1 if ACTIVATION == "none" else 2) + column  # of all slots' weights
        if not BULK:
            start_of_slot = weight + slot.to(tl.int64) * num_columns * num_depth * (1 if ACTIVATION == "none" else 2)
            gate_DN = start_of_slot + read_N.to(tl.int64)[None, :] * num_depth + depth[:, None]
            up_DN = gate_DN + num_columns.to(tl.int64) * num_depth
        sum_MN = tl.zeros([ROWS, COLUMNS], tl.float32)
        up_MN = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, num_depth, DEPTH):
            left = depth < num_depth - start
            values_MD = tl.load(x_MD) if EVEN else tl.load(x_MD, mask=left[None, :], other=0.0)
            if BULK:
                weights_DN = weight.load([row, start]).T  # rows behind the end belong to nobody, depth is filled up
            else:
                weights_DN = tl.load(gate_DN) if EVEN else tl.load(gate_DN, mask=left[:, None], other=0.0)
                gate_DN += DEPTH
            sum_MN = tl.dot(values_MD, weights_DN, sum_MN, input_precision="ieee")
            if ACTIVATION != "none":
                if BULK:
                    weights_DN = weight.load([row + num_columns, start]).T
                else:
                    weights_DN = tl.load(up_DN) if EVEN else tl.load(up_DN, mask=left[:, None], other=0.0)
                    up_DN += DEPTH
                up_MN = tl.dot(values_MD, weights_DN, up_MN, input_precision="ieee")
            x_MD += DEPTH
        if bias is not None:
            biases = bias + slot.to(tl.int64) * (num_columns if ACTIVATION == "none" else 2 * num_columns) + read_N
            sum_MN += tl.load(biases).to(tl.float32)[None, :]
            if ACTIVATION != "none":
                up_MN += tl.load(biases + num_columns).to(tl.float32)[None, :]
        sum_MN = activated(sum_MN, up_MN, ACTIVATION)
        out_MN = out + pairs_M.to(tl.int64)[:, None] * num_columns + columns_N[None, :]
        stored_MN = (rows < end)[:, None] & (columns_N < num_columns)[None, :]
        tl.store(out_MN, sum_MN.to(out.dtype.element_ty), mask=stored_MN)


def _described(weight: torch.Tensor, tiles: Tiles) -> TensorDescriptor:
    """All slots' weights as one matrix, for the bulk copy engine."""
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tiles.columns, tiles.depth])


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    permutation: Permutation,
    top_k: int,
    activation: str,
    tiles: Tiles,
) -> torch.Tensor:
    """One of the two products, by pair."""
    num_pairs, num_slots = len(permutation.order), weight.shape[0]
    columns, depth = weight.shape[1] // (1 if activation == "none" else 2), weight.shape[2]
    out = torch.empty((num_pairs, columns), dtype=x.dtype, device=x.device)
    if num_pairs == 0:
        return out
    if depth * x.element_size() % 16:
        tiles = tiles._replace(bulk=False)  # the copy engine takes rows of whole 16 bytes
    most = row_tiles(num_pairs, num_slots, tiles.rows)
    group = min(tiles.group, most) or most
    grid = triton.cdiv(most, group) * group * triton.cdiv(columns, tiles.columns)
    product_kernel[(grid,)](
        x.contiguous(),
        _described(weight, tiles) if tiles.bulk else weight,
        bias,
        out,
        *permutation,
        num_slots,
        columns,
        depth,
        group,
        TOP_K=top_k,
        ACTIVATION=activation,
        EVEN=depth % tiles.depth == 0,
        BULK=tiles.bulk,
        BLOCK_P=power_of_two(num_slots),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **overlap(x),
    )
    return out


def gate_up_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    permutation: Permutation,
    top_k: int,
    activation: Activation = "silu",
    bias: torch.Tensor | None = None,
    tiles: Tiles | Lines | None = None,
) -> torch.Tensor:
    """What `gate_up` computes; the same arguments and results, and tiles or lines to try."""
    tiles = tiles or choose_lines(len(permutation.order), len(weight), weight.shape[2], gated=True)
    if isinstance(tiles, Lines):
        return pair_product(x, weight, bias, permutation, top_k, activation, tiles)
    tiles = tiles or choose_tiles(
        len(permutation.order), len(weight), weight.shape[1] // 2, weight.shape[2], True, x.element_size()
    )
    return _product(x, weight, bias, permutation, top_k, activation, tiles)


def down_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    permutation: Permutation,
    bias: torch.Tensor | None = None,
    tiles: Tiles | Lines | None = None,
) -> torch.Tensor:
    """What `down` computes; the same arguments and results, and tiles or lines to try."""
    tiles = tiles or choose_lines(len(hidden), len(weight), weight.shape[2], gated=False)
    if isinstance(tiles, Lines):
        return pair_product(hidden, weight, bias, permutation, 1, "none", tiles)
    tiles = tiles or choose_tiles(
        len(hidden), len(weight), weight.shape[1], weight.shape[2], False, hidden.element_size()
    )
    return _product(hidden, weight, bias, permutation, 1, "none", tiles)
