"""SGLang's ``per_token`` recordings: sequences, phases, padding, copies, ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.importers import IMPORTERS, ModelFacts, Remarks
from profiler.importers.recording import RecordedRoutes, RecordedSequence, RecordingError
from tests.support.engine_recordings import (
    DECODE,
    EXTEND,
    TARGET_VERIFY,
    random_routes,
    slot_map,
    to_slots,
    token_record,
    write_tokens,
)
from tests.support.sglang_scheduler import Request, run_requests

LAYERS = [1, 3]
NUM_LAYERS, NUM_EXPERTS, TOP_K = 5, 6, 2
MAP = slot_map(NUM_LAYERS, NUM_EXPERTS, 2)
SHAPE = (NUM_LAYERS, MAP.shape[1])
FACTS = ModelFacts("m", NUM_EXPERTS, TOP_K, tuple(LAYERS))


def read(paths: list[Path], facts: ModelFacts = FACTS, remarks: Remarks | None = None) -> list[RecordedSequence]:
    recording = IMPORTERS["sglang"](paths, facts, remarks or Remarks())
    assert isinstance(recording, RecordedRoutes)
    assert (recording.layer_ids, recording.top_k, recording.num_experts) == (tuple(LAYERS), TOP_K, NUM_EXPERTS)
    return list(recording.sequences)


def routes_and_slots(num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    routes = random_routes(num_tokens, len(LAYERS), NUM_EXPERTS, TOP_K, seed)
    return routes, to_slots(routes, MAP, LAYERS, seed)


def one_pass(mode: int, num_tokens: int, start: int = 0, seed: int = 0, **changes: Any) -> dict[str, Any]:
    _, slots = routes_and_slots(num_tokens, seed)
    positions = range(start, start + num_tokens)
    lengths = None if mode == DECODE else [num_tokens]
    return token_record(0, mode, range(num_tokens), positions, slots, LAYERS, SHAPE, lengths) | changes


@given(
    new_tokens=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    budget=st.integers(3, 30),
    mixed=st.booleans(),
    padding=st.sampled_from([1, 4]),
    known=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_requests_are_put_together_again(
    new_tokens: list[int], budget: int, mixed: bool, padding: int, known: bool
) -> None:
    """Prompts so different in length that a position tells the request: then nothing can be mistaken."""
    requests, routes = [], []
    for index, new in enumerate(new_tokens):
        prompt = 2 + 7 * index
        routed, slots = routes_and_slots(prompt + new, seed=index)
        requests.append(Request(slots, np.arange(prompt + new) + 100 * index, prompt))
        routes.append(routed)
    records = run_requests(requests, LAYERS, SHAPE, budget=budget, mixed=mixed, padding=padding)
    with tempfile.TemporaryDirectory() as folder:
        path = write_tokens(Path(folder) / "0.pt", records, MAP)
        sequences = read([path], FACTS if known else ModelFacts("m"))
    assert len(sequences) == len(requests)
    for sequence, request, routed in zip(sequences, requests, routes, strict=True):
        np.testing.assert_array_equal(sequence.experts, routed)
        np.testing.assert_array_equal(sequence.position, np.arange(len(routed)))
        np.testing.assert_array_equal(sequence.decode, np.arange(len(routed)) >= request.prompt)
        np.testing.assert_array_equal(sequence.token_ids, request.token_ids)


def test_equal_lengths_lose_no_token_and_mix_no_phases(tmp_path: Path) -> None:
    """Requests that cannot be told apart by position: each token is still there once, in the right phase."""
    lengths = [(4, 3), (4, 0), (4, 5), (4, 1)]
    requests = []
    for index, (prompt, new) in enumerate(lengths):
        _, slots = routes_and_slots(prompt + new, index)
        requests.append(Request(slots, np.arange(prompt + new) + 100 * index, prompt))
    records = run_requests(requests, LAYERS, SHAPE, budget=99, mixed=False, padding=8)
    sequences = read([write_tokens(tmp_path / "0.pt", records, MAP)])
    found = {}
    for sequence in sequences:
        assert (np.diff(sequence.position) == 1).all()
        assert sequence.token_ids is not None
        columns = (sequence.token_ids.tolist(), sequence.experts.tolist(), sequence.decode.tolist())
        found |= {token: (experts, decoded) for token, experts, decoded in zip(*columns, strict=True)}
    for index, (prompt, new) in enumerate(lengths):
        routed, _ = routes_and_slots(prompt + new, index)
        for token in range(prompt + new):
            assert found[100 * index + token] == (routed[token].tolist(), token >= prompt)
    assert sum(len(sequence.position) for sequence in sequences) == sum(p + n for p, n in lengths)


def test_ranks_follow_each_other_and_views_count_once(tmp_path: Path) -> None:
    first, second = one_pass(EXTEND, 4), one_pass(EXTEND, 5, seed=1)
    paths = [
        write_tokens(tmp_path / "0.pt", [first], MAP),
        write_tokens(tmp_path / "1.pt", [first | {"rank": 1}], MAP),
        write_tokens(tmp_path / "2.pt", [second | {"rank": 2}], MAP),
        write_tokens(tmp_path / "3.pt", [], MAP),
    ]
    remarks = Remarks()
    assert [len(sequence.position) for sequence in read(paths, remarks=remarks)] == [4, 5]
    assert "files left out, equal to another rank's: 1" in remarks.lines()


def test_a_recording_that_starts_late_and_a_cached_prefix(tmp_path: Path) -> None:
    """A decode step of a request that was prefilled before, and a prompt whose first 7 tokens were in the cache."""
    records = [one_pass(DECODE, 1, start=20), one_pass(EXTEND, 3, start=7), one_pass(DECODE, 1, start=10)]
    remarks = Remarks()
    sequences = read([write_tokens(tmp_path / "0.pt", records, MAP)], remarks=remarks)
    assert [sequence.position.tolist() for sequence in sequences] == [[20], [7, 8, 9, 10]]
    assert [sequence.decode.tolist() for sequence in sequences] == [[True], [False, False, False, True]]
    assert "sequences whose beginning was not recorded: 1" in remarks.lines()


def without_routes(record: dict[str, Any], tokens: slice) -> dict[str, Any]:
    record["topk_ids_of_layer"][:, tokens] = -1
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (one_pass(EXTEND, 4, forward_mode=TARGET_VERIFY), "without speculative decoding"),
        (one_pass(EXTEND, 4, forward_mode="2"), "forward mode '2'"),
        (without_routes(one_pass(EXTEND, 4), slice(2, 4)), "no routes for 2 of 4 tokens"),
        (without_routes(one_pass(DECODE, 4, start=3), slice(2, 4)), "no routes for 2 of 4 tokens"),
        (one_pass(EXTEND, 4, positions=[0, 1, 2]), "3 positions"),
        (one_pass(EXTEND, 4, positions=[0, 1, 3, 4]), "positions jump"),
        (one_pass(EXTEND, 4, positions=[-1, 0, 1, 2]), "positions from -1 to 2"),
        (one_pass(EXTEND, 4, input_ids=[2**31] * 4), "input_ids from 2147483648"),
        (one_pass(EXTEND, 4, extend_seq_lens=[5]), "segments of"),
        (one_pass(EXTEND, 4, extend_seq_lens=None), "extend_seq_lens"),
        (one_pass(EXTEND, 4, input_ids=["a"] * 4), "input_ids"),
        (one_pass(EXTEND, 4, topk_ids_of_layer=None), "topk_ids_of_layer"),
    ],
)
def test_damaged_passes_are_refused(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write_tokens(tmp_path / "0.pt", [one_pass(EXTEND, 3), record], MAP)
    with pytest.raises(RecordingError, match=message):
        read([path])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (ModelFacts("other", NUM_EXPERTS + 1), "num_experts is 6, other has 7"),
        (ModelFacts("other", NUM_EXPERTS, 3), "top_k is 2, other has 3"),
        (ModelFacts("other", NUM_EXPERTS, 2, (1, 2, 3)), "nothing of MoE layer 2"),
        (ModelFacts("other", NUM_EXPERTS, 2, (1,)), "layer 3 of other is not MoE"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, facts: ModelFacts, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        read([write_tokens(tmp_path / "0.pt", [one_pass(EXTEND, 3)], MAP)], facts)


def test_a_fused_shared_expert_is_refused(tmp_path: Path) -> None:
    record = one_pass(EXTEND, 3)
    record["topk_ids_of_layer"][LAYERS, :, 1] = MAP.shape[1]
    with pytest.raises(RecordingError, match="without fused shared experts"):
        read([write_tokens(tmp_path / "0.pt", [record], MAP)])
