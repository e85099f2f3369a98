"""The permutation: the reference against a loop over slots, and the kernel against the reference."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.permute import permute


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 7), st.data())
def test_every_slot_has_its_pairs_in_order(tokens: int, top_k: int, num_slots: int, data: st.DataObject) -> None:
    pairs = st.lists(st.integers(-1, num_slots - 1), min_size=tokens * top_k, max_size=tokens * top_k)
    flat = data.draw(pairs)
    order, indptr = permute(torch.tensor(flat, dtype=torch.int32).view(tokens, top_k), num_slots)
    assert (order.dtype, indptr.dtype) == (torch.int32, torch.int32)
    assert (len(order), len(indptr)) == (tokens * top_k, num_slots + 1)
    for slot in range(num_slots):
        assert order[indptr[slot] : indptr[slot + 1]].tolist() == [i for i, s in enumerate(flat) if s == slot]
    assert int(indptr[0]) == 0
