"""The buffer between hooks and the host: the same result however often it is emptied, and little held meanwhile."""

from __future__ import annotations

import weakref
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler import route_buffer
from profiler.errors import ModelError
from profiler.route_buffer import RouteBuffer


@given(
    calls=st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6),
    batch_size=st.integers(1, 3),
    num_columns=st.integers(1, 3),
    top_k=st.integers(1, 4),
    most_waiting_bytes=st.sampled_from([0, 3000, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_calls_come_back_sorted_and_in_order(
    calls: list[tuple[int, bool]],
    batch_size: int,
    num_columns: int,
    top_k: int,
    most_waiting_bytes: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = [[] for _ in range(num_columns)]
    buffer = RouteBuffer([f"column {column}" for column in range(num_columns)], top_k)
    with mock.patch.object(route_buffer, "MOST_WAITING_BYTES", most_waiting_bytes):
        for positions, tied in calls:
            for column in range(num_columns):
                rows = batch_size * positions
                experts = torch.rand(rows, 9, generator=generator).argsort(dim=1)[:, :top_k]
                weights = torch.rand(rows, top_k, generator=generator).to(dtype)
                weights = weights.round() if tied else weights
                buffer.add(column, (experts, weights))
                order = np.argsort(-weights.float().numpy(), axis=1, kind="stable")
                kept = [np.take_along_axis(part, order, 1) for part in (experts.numpy(), weights.float().numpy())]
                expected[column].append([part.reshape(batch_size, positions, top_k) for part in kept])
        experts_BSCK, weights_BSCK = buffer.take(batch_size, sum(positions for positions, _ in calls))
    for column, parts in enumerate(expected):
        np.testing.assert_array_equal(experts_BSCK[:, :, column], np.concatenate([part[0] for part in parts], axis=1))
        whole = np.concatenate([part[1] for part in parts], axis=1)
        np.testing.assert_array_equal(weights_BSCK[:, :, column], whole.astype(np.float16))


def test_what_waits_is_bounded_whatever_it_is_a_view_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_buffer, "MOST_WAITING_BYTES", 1 << 20)
    buffer = RouteBuffer(["column"], 2)
    held, most_held = [], 0
    for _ in range(50):
        everything = torch.zeros(1000, 50, dtype=torch.int64)  # 400 kB, of which a call needs 16 kB
        buffer.add(0, (everything[:, :2], torch.ones(1000, 2)))
        held.append(weakref.ref(everything.untyped_storage()))
        del everything
        most_held = max(most_held, int(sum(buffer._waiting_bytes.values())))
    assert most_held <= 1 << 20
    assert sum(len(calls) for calls in buffer._waiting.values()) <= 2
    experts, _ = buffer.take(1, 50_000)
    assert experts.shape == (1, 50_000, 1, 2)


def test_a_column_that_missed_a_position_is_named() -> None:
    buffer = RouteBuffer(["seen", "unseen"], 1)
    buffer.add(0, (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)))
    with pytest.raises(ModelError, match="unseen saw 0 tokens, expected 2 x 2"):
        buffer.take(2, 2)
