"""Passes of prompts, and sizes of decode steps."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.native.model import bucket_of
from runtime.native.prefill import plan_passes
from runtime.step_plan import Piece


@settings(deadline=None, derandomize=True)
@given(
    bounds=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 50)), min_size=1, max_size=8), most=st.integers(1, 40)
)
def test_passes_cover_every_piece_in_order(bounds: list[tuple[int, int]], most: int) -> None:
    done = [start for start, _ in bounds]
    given = [Piece(number, start, start + length) for number, (start, length) in enumerate(bounds)]
    for pieces in plan_passes(given, most):
        assert 0 < sum(piece.stop - piece.start for piece in pieces) <= most
        assert len({piece.sequence for piece in pieces}) == len(pieces)
        for piece in pieces:
            assert piece.start == done[piece.sequence] < piece.stop
            done[piece.sequence] = piece.stop
    assert done == [piece.stop for piece in given]


@given(sequences=st.integers(1, 700))
def test_buckets_hold_their_sequences_without_much_padding(sequences: int) -> None:
    rows = bucket_of(sequences, 1024)
    assert sequences <= rows <= max(sequences + 7, sequences * 3 // 2)
    assert bucket_of(rows, 1024) == rows
    assert bucket_of(sequences, sequences) == sequences
