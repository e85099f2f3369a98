"""Pages are handed out once, taken back whole, and refused when there are too few."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import ModelError
from runtime.native.cache import PageAllocator
from runtime.native.model import bucket_of
from runtime.native.prefill import plan_passes


@settings(deadline=None, derandomize=True)
@given(operations=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 70)), max_size=40))
def test_no_page_is_held_twice(operations: list[tuple[int, int]]) -> None:
    allocator = PageAllocator(12, 16)
    held: dict[int, list[int]] = {}
    for sequence, tokens in operations:
        if sequence in held:
            del held[sequence]
            allocator.release(sequence)
        elif -(-tokens // 16) <= 12 - sum(map(len, held.values())):
            held[sequence] = list(allocator.allocate(sequence, tokens))
            assert len(held[sequence]) == -(-tokens // 16) == allocator.pages_held(sequence)
        else:
            with pytest.raises(ModelError, match=f"{tokens} tokens: expected at most"):
                allocator.allocate(sequence, tokens)
        pages = [page for own in held.values() for page in own]
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(12))
        assert allocator.num_free == 12 - len(pages)


def test_misuse_is_noticed() -> None:
    allocator = PageAllocator(2, 16)
    allocator.allocate(0, 1)
    with pytest.raises(AssertionError):
        allocator.allocate(0, 1)
    allocator.release(0)
    with pytest.raises(KeyError):
        allocator.release(0)


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), most=st.integers(1, 40))
def test_passes_cover_every_prompt_in_order(lengths: list[int], most: int) -> None:
    done = [0] * len(lengths)
    for pieces in plan_passes(lengths, most):
        assert 0 < sum(piece.stop - piece.start for piece in pieces) <= most
        assert len({piece.number for piece in pieces}) == len(pieces)
        for piece in pieces:
            assert piece.start == done[piece.number] < piece.stop
            done[piece.number] = piece.stop
    assert done == lengths


@given(sequences=st.integers(1, 700))
def test_buckets_hold_their_sequences_without_much_padding(sequences: int) -> None:
    rows = bucket_of(sequences, 1024)
    assert sequences <= rows <= max(sequences + 7, sequences * 3 // 2)
    assert bucket_of(rows, 1024) == rows
    assert bucket_of(sequences, sequences) == sequences
