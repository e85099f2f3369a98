"""Triton functions that move rows between GPUs: every word of data travels with the number of the exchange it is of.

A row is read as 32-bit words: one float32, or two bfloat16 or float16. A message is a word and, in the upper half of
the same 64 bits, the epoch. Whoever waits for a row reads it until every message has the epoch: 64 bits arrive whole,
so neither a flag of its own nor a fence is needed, and a row costs one way through the link.

Shape suffix: W words of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack(words_W, KIND: tl.constexpr):
    """The values of words as float32, the lower halves' and the upper halves' (zeros where a word is one float32)."""
    if KIND == "fp32":
        low_W = words_W.to(tl.float32, bitcast=True)
        high_W = tl.zeros_like(low_W)
    elif KIND == "bf16":
        low_W = (words_W << 16).to(tl.float32, bitcast=True)
        high_W = (words_W & -65536).to(tl.float32, bitcast=True)
    else:
        low_W = words_W.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high_W = (words_W >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low_W, high_W


@triton.jit
def pack(low_W, high_W, KIND: tl.constexpr):
    """Back from `unpack`, rounded."""
    if KIND == "fp32":
        words_W = low_W.to(tl.int32, bitcast=True)
    else:
        dtype: tl.constexpr = tl.bfloat16 if KIND == "bf16" else tl.float16
        lower_W = low_W.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        words_W = lower_W | (high_W.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return words_W


@triton.jit
def place_of(epoch, gpu, row, most_rows, stride, GPUS: tl.constexpr):
    """Of a row's first message in a mailbox ``[2, G, R, stride]``, with R most rows."""
    return (((epoch & 1) * GPUS + gpu) * most_rows + row) * stride


@triton.jit
def push(peers, gpu, place, columns, inside_W, words_W, epoch):
    """Write a row into a GPU's mailbox.

    Args:
        peers: int64, the address of every GPU's mailbox.
        gpu: whose.
        place: of the row's first message.
        columns: of the words.
        inside_W: which of them there are.
        words_W: int32.
        epoch: of the exchange, int32.
    """
    box = tl.multiple_of(tl.load(peers + gpu).to(tl.pointer_type(tl.int64)), 16)
    messages_W = (words_W.to(tl.int64) & 0xFFFFFFFF) | (epoch.to(tl.int64) << 32)
    tl.store(box + place + columns, messages_W, mask=inside_W)


@triton.jit
def _look(box, place, columns, inside_W, epoch):
    """What stands in a mailbox now, and whether any of it is of another epoch."""
    messages_W = tl.load(box + place + columns, mask=inside_W, other=0, volatile=True)
    late_W = inside_W & ((messages_W >> 32).to(tl.int32) != epoch)
    return messages_W, tl.max(late_W.to(tl.int32), 0)


@triton.jit
def wait(box, place, columns, inside_W, epoch):
    """Read a row of this GPU's mailbox once all of it is there, int32 ``[W]``."""
    messages_W, late = _look(box, place, columns, inside_W, epoch)
    while late > 0:  # a number, since the compiler fails on loops that carry masks
        messages_W, late = _look(box, place, columns, inside_W, epoch)
    return messages_W.to(tl.int32)


@triton.jit
def load_row(source, row, width, columns, inside_W, KIND: tl.constexpr):
    """A row of a tensor that is read as words, as `unpack` gives it."""
    return unpack(tl.load(source + row * width + columns, mask=inside_W, other=0), KIND)


@triton.jit
def weighted_row(pairs, slots, weights, row, width, columns, inside_W, TOP_K: tl.constexpr, KIND: tl.constexpr):
    """Sum of the pairs of a row that this rank served, by weight, in the order of the choices; float32."""
    low_W = tl.zeros(columns.shape, tl.float32)
    high_W = tl.zeros(columns.shape, tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = row * TOP_K + choice
        here = tl.load(slots + pair) >= 0
        weight = tl.load(weights + pair)
        lower_W, upper_W = load_row(pairs, pair, width, columns, inside_W & here, KIND)
        low_W += weight * lower_W
        high_W += weight * upper_W
    return low_W, high_W


@triton.jit
def load_scale(norm_weight, width, columns, inside_W, KIND: tl.constexpr):
    """The norm's weights of any dtype, as `unpack` gives values."""
    lanes: tl.constexpr = 1 if KIND == "fp32" else 2
    low_W = tl.load(norm_weight + columns * lanes, mask=inside_W, other=0.0).to(tl.float32)
    high_W = tl.load(norm_weight + columns * lanes + lanes - 1, mask=inside_W, other=0.0).to(tl.float32)
    return low_W, high_W


@triton.jit
def finish_row(
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
    KIND: tl.constexpr,
):
    """Add the shared experts' output and the residual to a summed row, and write the sum and its norm."""
    lanes: tl.constexpr = 1 if KIND == "fp32" else 2
    if shared is not None:
        lower_W, upper_W = load_row(shared, row, width, columns, inside_W, KIND)
        low_W += lower_W
        high_W += upper_W
    lower_W, upper_W = load_row(residual, row, width, columns, inside_W, KIND)
    stored_W = pack(low_W + lower_W, high_W + upper_W, KIND)
    place = row * width + columns
    tl.store(total + place, stored_W, mask=inside_W)
    low_W, high_W = unpack(stored_W, KIND)
    inverse = 1 / tl.sqrt(tl.sum(low_W * low_W + high_W * high_W, 0) / (width * lanes) + eps)
    normed_W = pack(low_W * inverse * scale_low_W, high_W * inverse * scale_high_W, KIND)
    tl.store(normed + place, normed_W, mask=inside_W)
