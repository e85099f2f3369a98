"""Sequences that join and leave a batch in any order get the logits they get alone."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch import CausalModel, SequenceBatch, is_mergeable, plan_passes
from runtime.requests import SamplingParameters
from runtime.step_plan import Admission, Piece
from tests.support.tiny_models import tiny_model

TOLERANCE = 1e-4
PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], list(range(20, 33)), [77], [64, 3]]
FEED = [[(17 * sequence + 5 * step) % 120 + 4 for step in range(12)] for sequence in range(len(PROMPTS))]

# "admit" joins so many further prompts, "retire" drops a row, "decode" feeds a token to all.
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.integers(1, 3)),
        st.tuples(st.just("retire"), st.integers(0, 4)),
        st.tuples(st.just("decode"), st.just(0)),
    ),
    max_size=14,
)


@cache
def causal_model(family: str) -> CausalModel:
    return CausalModel(tiny_model(family))


@cache
def alone(family: str, sequence: int) -> torch.Tensor:
    """Logits after the prompt and after each fed token ``[1 + fed, V]``, in one pass over the whole sequence."""
    tokens = PROMPTS[sequence] + FEED[sequence]
    with torch.inference_mode():
        logits = causal_model(family).model(torch.tensor([tokens])).logits[0]
    return logits[len(PROMPTS[sequence]) - 1 :].float()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_any_order_of_joining_and_leaving(family: str, operations: list[tuple[str, int]]) -> None:
    model = causal_model(family)
    waiting = list(range(len(PROMPTS)))
    fed: dict[int, int] = {}
    batch: SequenceBatch | None = None
    for name, argument in [("admit", 2), *operations, ("decode", 0)]:
        if name == "admit" and waiting:
            joining, waiting = waiting[:argument], waiting[argument:]
            new, logits = model.prefill(joining, [PROMPTS[sequence] for sequence in joining])
            fed |= dict.fromkeys(joining, 0)
            check(family, joining, logits, fed)
            if batch is None:
                batch = new
            else:
                batch.absorb(new)
        elif name == "retire" and batch is not None:
            gone = batch.sequences[argument % len(batch.sequences)]
            rows = [row for row, sequence in enumerate(batch.sequences) if sequence != gone]
            if rows:
                batch.keep(rows)
            else:
                batch = None
        elif name == "decode" and batch is not None and all(fed[s] < len(FEED[s]) for s in batch.sequences):
            logits = model.decode(batch, [FEED[sequence][fed[sequence]] for sequence in batch.sequences])
            for sequence in batch.sequences:
                fed[sequence] += 1
            check(family, batch.sequences, logits, fed)
            assert batch.mask.sum(dim=1).tolist() == [len(PROMPTS[s]) + fed[s] for s in batch.sequences]
            assert batch.mask.shape[1] == max(len(PROMPTS[s]) + fed[s] for s in batch.sequences), "no empty columns"


def check(family: str, sequences: list[int], logits: torch.Tensor, fed: dict[int, int]) -> None:
    expected = torch.stack([alone(family, sequence)[fed[sequence]] for sequence in sequences])
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("cuts", [[1], [5, 8], [12]])
def test_a_prompt_in_pieces(family: str, cuts: list[int]) -> None:
    model, prompt = causal_model(family), PROMPTS[2]
    batch, tokens = model.start([2], [prompt[: cuts[0]]])
    model.run(batch, tokens)
    for start, stop in itertools.pairwise([*cuts, len(prompt)]):
        logits = model.run(batch, model.go_on(batch, prompt[start:stop]))
    check(family, [2], logits, {2: 0})
    other, _ = model.prefill([0], [PROMPTS[0]])
    other.absorb(batch)
    logits = model.decode(other, [FEED[0][0], FEED[2][0]])
    check(family, [0, 2], logits, {0: 1, 2: 1})


@settings(deadline=None, derandomize=True)
@given(
    prompts=st.lists(
        st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1), st.integers(1, n))),
        max_size=9,
    )
)
def test_passes_hold_whole_prompts_of_similar_length_or_one_piece(prompts: list[tuple[int, int, int]]) -> None:
    admissions = {n: Admission(n, [5] * length, 0, SamplingParameters()) for n, (length, _, _) in enumerate(prompts)}
    pieces = [Piece(n, start, max(stop, start + 1)) for n, (_, start, stop) in enumerate(prompts)]
    passes = plan_passes(pieces, admissions)
    assert [piece for together in passes for piece in together] == pieces
    for together in passes:
        lengths = [piece.stop for piece in together]
        if len(together) > 1:
            assert all(p.start == 0 and p.stop == len(admissions[p.sequence].tokens) for p in together)
            assert max(lengths) * len(lengths) <= 2 * sum(lengths)


def test_families_with_recurrent_state_are_not_merged() -> None:
    assert not causal_model("qwen3_next").can_merge
    batch, _ = causal_model("qwen3_next").prefill([0], [PROMPTS[0]])
    assert not is_mergeable(batch.cache)
    assert causal_model("gpt_oss").can_merge


def test_rows_of_a_recurrent_family_can_leave() -> None:
    model = causal_model("qwen3_next")
    batch, _ = model.prefill([0, 1, 2], PROMPTS[:3])
    batch.keep([2, 0])
    logits = model.decode(batch, [FEED[2][0], FEED[0][0]])
    check("qwen3_next", [2, 0], logits, {2: 1, 0: 1})
