"""Which tiles the experts' products are cut into, from what the host knows of a step."""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """One program's share of a product, and how it is compiled.

    Attributes:
        rows: pairs of one slot.
        columns: of the output.
        depth: of the reduction, loaded at once.
        warps: of one program.
        stages: loads in flight.
        group: row tiles that are computed column block by column block before the next; 0 for all.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 0


def row_tiles(num_pairs: int, num_slots: int, rows: int) -> int:
    """The most row tiles that so many pairs can have, however they fall on the slots."""
    active = min(num_pairs, num_slots)
    return active + (num_pairs - active) // rows


def choose_tiles(num_pairs: int, num_slots: int, columns: int, depth: int, gated: bool, item_bytes: int) -> Tiles:
    """Tiles of one product.

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
    rows_per_slot = num_pairs / num_slots
    if rows_per_slot <= 10:
        return Tiles(rows=16, columns=16 if gated else 32, depth=128, warps=4, stages=4)
    if rows_per_slot <= 24:
        return Tiles(rows=32, columns=32 if gated else 64, depth=128, warps=4, stages=4)
    if rows_per_slot <= 80:
        return Tiles(rows=64, columns=64, depth=64, warps=4, stages=4)
    return Tiles(rows=128, columns=128, depth=64, warps=8, stages=3, group=8)
