"""Triton kernels of `alltoall`: routes to every GPU, rows to the GPUs that serve them, results home.

They send and wait as those in `kernels.exchange.kernel` do. Rows and results do not go to all GPUs: there the gather of
the routes says that every GPU has read what came before.

Shape legend: T rows, K choices per row, G GPUs, W words of a row, R most rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.exchange.kernel import FREE
from kernels.exchange.words import finish_row, load_scale, pack, place_of, push, unpack, wait, weighted_row


@triton.jit(do_not_specialize=FREE)
def gather_routes_kernel(
    ids,
    weights,
    places,
    all_ids,
    all_weights,
    slots,
    gpus,
    slot_of_expert,
    gpu_of_expert,
    box,
    peers,
    counters,
    num_rows,
    most_rows,
    stride,
    width,
    rank,
    TOP_K: tl.constexpr,
    GPUS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Every GPU's routes on every GPU, ``[G, T, K]``, -1 for rows whose place is negative; ``width`` is 2 K.

    Where there is ``gpu_of_expert``, it and ``slot_of_expert`` are looked up for every pair.
    """
    columns = tl.arange(0, BLOCK)
    inside_W = columns < width
    is_id_W = columns < TOP_K
    is_weight_W = inside_W & (columns >= TOP_K)
    first, step = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        ids_W = tl.load(ids + row * TOP_K + columns, mask=is_id_W, other=0)
        ids_W = tl.where(tl.load(places + row) < 0, -1, ids_W)
        weights_W = tl.load(weights + row * TOP_K + columns - TOP_K, mask=is_weight_W, other=0)
        words_W = tl.where(is_id_W, ids_W, weights_W)
        place = place_of(epoch, rank, row, most_rows, stride, GPUS)
        for gpu in tl.static_range(GPUS):
            push(peers, gpu, place, columns, inside_W, words_W, epoch)
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        for gpu in tl.static_range(GPUS):
            place = place_of(epoch, gpu, row, most_rows, stride, GPUS)
            words_W = wait(box, place, columns, inside_W, epoch)
            pairs_W = (gpu * num_rows + row) * TOP_K + columns
            tl.store(all_ids + pairs_W, words_W, mask=is_id_W)
            tl.store(all_weights + pairs_W - TOP_K, words_W, mask=is_weight_W)
            if gpu_of_expert is not None:
                real_W = is_id_W & (words_W >= 0)
                slot_W = tl.load(slot_of_expert + words_W, mask=real_W, other=-1)
                gpu_W = tl.load(gpu_of_expert + words_W, mask=real_W, other=-1)
                tl.store(slots + pairs_W, slot_W, mask=is_id_W)
                tl.store(gpus + pairs_W, gpu_W.to(tl.int32), mask=is_id_W)
        tl.debug_barrier()
        tl.store(counters + row, epoch)


@triton.jit
def _goes_to(gpus, row, gpu, TOP_K: tl.constexpr):
    """Whether any of a row's pairs is served by a GPU."""
    found = row * 0
    for choice in tl.static_range(TOP_K):
        found += (tl.load(gpus + row * TOP_K + choice) == gpu).to(tl.int32)
    return found > 0


@triton.jit(do_not_specialize=FREE)
def dispatch_kernel(
    rows,
    gpus,
    out,
    box,
    peers,
    counters,
    received,
    num_rows,
    most_rows,
    stride,
    width,
    rank,
    TOP_K: tl.constexpr,
    GPUS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Send this GPU's rows once to every GPU that serves one of their pairs; ``[G, T, W]``, other rows unwritten."""
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
            if _goes_to(gpus, rank * num_rows + row, gpu, TOP_K):
                push(peers, gpu, place, columns, inside_W, words_W, epoch)
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        came = tl.load(received + row)
        for gpu in tl.static_range(GPUS):
            from_all = gpu * num_rows + row
            if _goes_to(gpus, from_all, rank, TOP_K):
                place = place_of(epoch, gpu, row, most_rows, stride, GPUS)
                words_W = wait(box, place, columns, inside_W, epoch)
                tl.store(out + from_all * width + columns, words_W, mask=inside_W)
                came += (gpu != rank).to(tl.int64)
        tl.debug_barrier()
        tl.store(counters + row, epoch)
        tl.store(received + row, came)


@triton.jit(do_not_specialize=FREE)
def collect_kernel(
    pairs,
    slots,
    weights,
    gpus,
    shared,
    residual,
    norm_weight,
    total,
    normed,
    box,
    peers,
    counters,
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
    """Send what was computed for other GPUs' rows home; sum what comes home in the order of the GPUs, and normalise."""
    columns = tl.arange(0, BLOCK)
    inside_W = columns < width
    scale_low_W, scale_high_W = load_scale(norm_weight, width, columns, inside_W, KIND)
    first, step = tl.program_id(0), tl.num_programs(0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        place = place_of(epoch, rank, row, most_rows, stride, GPUS)
        for gpu in tl.static_range(GPUS):
            from_all = gpu * num_rows + row
            if _goes_to(gpus, from_all, rank, TOP_K):
                low_W, high_W = weighted_row(pairs, slots, weights, from_all, width, columns, inside_W, TOP_K, KIND)
                push(peers, gpu, place, columns, inside_W, pack(low_W, high_W, KIND), epoch)
    for row in range(first, num_rows, step):
        epoch = tl.load(counters + row) + 1
        low_W = tl.zeros([BLOCK], tl.float32)
        high_W = tl.zeros([BLOCK], tl.float32)
        for gpu in tl.static_range(GPUS):
            if _goes_to(gpus, rank * num_rows + row, gpu, TOP_K):
                place = place_of(epoch, gpu, row, most_rows, stride, GPUS)
                lower_W, upper_W = unpack(wait(box, place, columns, inside_W, epoch), KIND)
                low_W += lower_W
                high_W += upper_W
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
        tl.debug_barrier()
        tl.store(counters + row, epoch)
