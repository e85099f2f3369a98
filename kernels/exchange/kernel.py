"""Triton kernels of the exchange between the GPUs of one host, over mailboxes that every GPU can write to.

Program p works on rows p, p + programs, …: first it sends all of them, then it waits for those of the other GPUs. All
programs of a launch run at the same time, so whatever order GPUs work in, none waits for a row that is not sent.

A row's counter says how many exchanges it took part in; its mailboxes alternate. When a GPU writes to a mailbox, every
GPU has read what stood there two exchanges ago: it has sent the row since, in a later kernel than the one that read.

Shape legend: T rows, K choices per row, G GPUs, W words of a row, R most rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.exchange.words import finish_row, load_row, load_scale, pack, place_of, push, unpack, wait, weighted_row

FREE = ["num_rows"]


@triton.jit(do_not_specialize=FREE)
def reduce_kernel(
    part,
    slots,
    weights,
    shared,
    residual,
    norm_weight,
    total,
    normed,
    box,
    peers,
    counters,
    sums,
    sum_peers,
    num_rows,
    most_rows,
    stride,
    width,
    eps,
    rank,
    TOP_K: tl.constexpr,
    GPUS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sum all GPUs' parts in the order of the GPUs, add the residual, and normalise.

    A part is a row of ``part``, or where there are ``slots`` the weighted sum of a row's pairs. Without ``sums`` every
    GPU sends its part to all (one way); with it to the row's owner, which sends the sum to all (two ways, fewer bytes).
    """
    columns = tl.arange(0, BLOCK)
    inside_W = columns < width
    scale_low_W, scale_high_W = load_scale(norm_weight, width, columns, inside_W, KIND)
    first, step = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in range(first, num_rows, step):
        if slots is None:
            low_W, high_W = load_row(part, row, width, columns, inside_W, KIND)
        else:
            low_W, high_W = weighted_row(part, slots, weights, row, width, columns, inside_W, TOP_K, KIND)
        epoch = tl.load(counters + row) + 1
        words_W = pack(low_W, high_W, KIND)
        place = place_of(epoch, rank, row, most_rows, stride, GPUS)
        if sums is None:
            for gpu in tl.static_range(GPUS):
                push(peers, gpu, place, columns, inside_W, words_W, epoch)
        else:
            push(peers, row % GPUS, place, columns, inside_W, words_W, epoch)
    if sums is not None:
        for row in range(first, num_rows, step):
            if row % GPUS == rank:
                epoch = tl.load(counters + row) + 1
                low_W, high_W = _summed(box, epoch, row, most_rows, stride, columns, inside_W, GPUS, KIND)
                place = place_of(epoch, 0, row, most_rows, stride, 1)
                for gpu in tl.static_range(GPUS):
                    push(sum_peers, gpu, place, columns, inside_W, pack(low_W, high_W, KIND), epoch)
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        if sums is None:
            low_W, high_W = _summed(box, epoch, row, most_rows, stride, columns, inside_W, GPUS, KIND)
        else:
            place = place_of(epoch, 0, row, most_rows, stride, 1)
            low_W, high_W = unpack(wait(sums, place, columns, inside_W, epoch), KIND)
        finish_row(
            low_W,
            high_W,
            shared,
            residual,
            total,
            normed,
            scale_low_W,
            scale_high_W,
            row,
            width,
            eps,
            columns,
            inside_W,
            KIND,
        )
        tl.debug_barrier()  # all threads have read the counter
        tl.store(counters + row, epoch)


@triton.jit
def _summed(box, epoch, row, most_rows, stride, columns, inside_W, GPUS: tl.constexpr, KIND: tl.constexpr):
    """Sum of a row's parts as they come from all GPUs, in the order of the GPUs; float32."""
    low_W = tl.zeros(columns.shape, tl.float32)
    high_W = tl.zeros(columns.shape, tl.float32)
    for gpu in tl.static_range(GPUS):
        place = place_of(epoch, gpu, row, most_rows, stride, GPUS)
        lower_W, upper_W = unpack(wait(box, place, columns, inside_W, epoch), KIND)
        low_W += lower_W
        high_W += upper_W
    return low_W, high_W


@triton.jit(do_not_specialize=FREE)
def gather_kernel(
    rows,
    out,
    box,
    peers,
    counters,
    num_rows,
    most_rows,
    stride,
    width,
    rank,
    GPUS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Every GPU's rows on every GPU, ``[G, T, W]``."""
    columns = tl.arange(0, BLOCK)
    inside_W = columns < width
    first, step = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        words_W = tl.load(rows + row * width + columns, mask=inside_W, other=0)
        place = place_of(epoch, rank, row, most_rows, stride, GPUS)
        for gpu in tl.static_range(GPUS):
            push(peers, gpu, place, columns, inside_W, words_W, epoch)
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        for gpu in tl.static_range(GPUS):
            place = place_of(epoch, gpu, row, most_rows, stride, GPUS)
            words_W = wait(box, place, columns, inside_W, epoch)
            tl.store(out + (gpu * num_rows + row) * width + columns, words_W, mask=inside_W)
        tl.debug_barrier()
        tl.store(counters + row, epoch)
