"""Passes of prompts, and sizes of decode steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.native.model import bucket_of
from runtime.native.prefill import plan_passes
from runtime.step_plan import Piece, StepPlan
from tests.support.native import PAGE_SIZE, admission, drive, native_model, prefill


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


def test_padding_repeats_the_first_row_when_that_gets_another_page(saved_model: Callable[[str], str]) -> None:
    model = native_model(saved_model("qwen3_moe"))
    prompts = [[5 + number] * (PAGE_SIZE - 2 + number) for number in range(3)]
    admissions = [admission(number, prompt, 8) for number, prompt in enumerate(prompts)]
    prefill(model, [replace(each, pages=each.pages[:1]) for each in admissions])
    for number in (2, 1, 0):
        model.launch(StepPlan(grow=[(number, admissions[number].pages[1])]))()
        assert model._filled is not None
        for rows in (model._filled.page_table, model._filled.tokens, model._filled.positions):
            torch.testing.assert_close(rows[3], rows[0])


def test_compiling_before_the_weights_are_read_leaves_nothing(saved_model: Callable[[str], str]) -> None:
    prompts, arrivals = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12]], [0, 2]
    model, compiled = native_model(saved_model("qwen3_moe")), native_model(saved_model("qwen3_moe"))
    weights = compiled.decoder.weights.embedding
    kept = weights.clone()
    weights.zero_()
    compiled.compile_steps()
    weights.copy_(kept)
    expected, found = (drive(each, prompts, arrivals, 6) for each in (model, compiled))
    assert found.tokens == expected.tokens
    for number in range(2):
        np.testing.assert_array_equal(np.stack(found.logits[number]), np.stack(expected.logits[number]))
