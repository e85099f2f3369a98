"""Which tiles the experts' products are cut into, from what the host knows of a step."""

from __future__ import annotations

from typing import NamedTuple

FEW_PROGRAMS = 2 * 132  # two for each of Hopper's multiprocessors
SHALLOW = 2048  # reduction, of a model's width or less
DEEPEST = 8192  # reduction of lines; tiles read longer ones as fast


class Tiles(NamedTuple):
    """One program's share of a product, and how it is compiled.

    Attributes:
        rows: pairs of one slot.
        columns: of the output.
        depth: of the reduction, loaded at once.
        warps: of one program.
        stages: loads in flight.
        group: row tiles that are computed column block by column block before the next; 0 for all.
        bulk: load the weights by the bulk copy engine.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 0
    bulk: bool = False


class Lines(NamedTuple):
    """A program's share of one pair's product, where few pairs are computed one by one.

    Attributes:
        columns: of the output.
        depth: of the reduction, loaded at once; the rest follows in the same program.
        warps: of one program.
    """

    columns: int
    depth: int
    warps: int


def row_tiles(num_pairs: int, num_slots: int, rows: int) -> int:
    """The most row tiles that so many pairs can have, however they fall on the slots."""
    active = min(num_pairs, num_slots)
    return active + (num_pairs - active) // rows


def choose_lines(num_pairs: int, num_slots: int, depth: int, gated: bool) -> Lines | None:
    """Lines of one product, None where tiles are faster, as measured on an H100 (`benchmarks/kernels_moe_pairs.py`).

    Two pairs of one slot read its weights twice, the second time out of L2; up to half as many pairs as slots that is
    cheaper than tiles.

    Args:
        num_pairs: T·K.
        num_slots: P.
        depth: of the reduction.
        gated: whether each column has a second row of weights.
    """
    if num_pairs > num_slots // 2 or depth > DEEPEST:
        return None
    if depth <= 2048 and not gated:
        return Lines(columns=8, depth=256, warps=4)
    return Lines(columns=4, depth=1024, warps=4)


def choose_tiles(num_pairs: int, num_slots: int, columns: int, depth: int, gated: bool, item_bytes: int) -> Tiles:
    """Tiles of one product, as they were fastest on an H100 or, for short reductions, an H200 (`kernels_moe_tune.py`).

    A slot's rows beyond one row tile re-read its weights, out of L2 while other tiles of the slot run: up to 16 rows
    per slot on average this is cheaper than wider tiles that are mostly empty.

    Args:
        num_pairs: T·K.
        num_slots: P; the routes are expected to fall on them evenly.
        columns: of the output; the gate's alone where gated.
        depth: of the reduction.
        gated: whether each column has a second row of weights.
        item_bytes: of one element.
    """
    if item_bytes == 4:  # for tests alone
        return Tiles(rows=16, columns=32, depth=32, warps=4, stages=2)
    return _gated(num_pairs, num_slots, columns, depth) if gated else _plain(num_pairs, num_slots, columns, depth)


def _gated(num_pairs: int, num_slots: int, columns: int, depth: int) -> Tiles:
    rows_per_slot = num_pairs / num_slots
    if rows_per_slot <= 16:
        if min(num_pairs, num_slots) * columns <= 64 * FEW_PROGRAMS:
            return Tiles(rows=16, columns=64, depth=128, warps=4, stages=3)
        if depth <= SHALLOW:
            return Tiles(rows=16, columns=128, depth=128, warps=8, stages=2)
        return Tiles(rows=16, columns=32, depth=128, warps=4, stages=5)
    if rows_per_slot <= 32:
        if depth <= SHALLOW:
            return Tiles(rows=32, columns=128, depth=128, warps=8, stages=2)
        return Tiles(rows=32, columns=64, depth=128, warps=4, stages=3)
    if rows_per_slot <= 80:
        return Tiles(rows=64, columns=128, depth=64, warps=8, stages=4)
    return Tiles(rows=128, columns=128, depth=64, warps=8, stages=4, group=8, bulk=True)


def _plain(num_pairs: int, num_slots: int, columns: int, depth: int) -> Tiles:
    rows_per_slot = num_pairs / num_slots
    if rows_per_slot <= 12:
        if min(num_pairs, num_slots) * columns <= 128 * FEW_PROGRAMS:
            return Tiles(rows=16, columns=128, depth=128, warps=8, stages=4)
        if depth <= SHALLOW:
            return Tiles(rows=16, columns=128, depth=128, warps=4, stages=3)
        return Tiles(rows=16, columns=64, depth=256, warps=4, stages=3)
    if rows_per_slot <= 24:
        return Tiles(rows=32, columns=128, depth=128, warps=4, stages=3)
    if rows_per_slot <= 80:
        return Tiles(rows=64, columns=256, depth=64, warps=8, stages=4)
    return Tiles(rows=128, columns=256, depth=64, warps=8, stages=4, group=8, bulk=True)
