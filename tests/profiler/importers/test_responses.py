"""Routes in responses over HTTP, of SGLang and vLLM; vLLM's load statistics."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.importers import IMPORTERS, ModelFacts, Remarks
from profiler.importers.recording import RecordedCounts, RecordedRoutes, RecordedSequence, RecordingError
from tests.support.engine_recordings import (
    count_routes,
    in_all_layers,
    npy_text,
    random_routes,
    sglang_text,
    slot_map,
    to_slots,
    write_lines,
)

LAYERS = (1, 3)
FACTS = ModelFacts("m", 8, 2, LAYERS, 4)


def read(
    engine: str, folder: Path, lines: list[Any], facts: ModelFacts = FACTS, remarks: Remarks | None = None
) -> list[RecordedSequence]:
    recording = IMPORTERS[engine]([write_lines(folder / "r.jsonl", lines)], facts, remarks or Remarks())
    assert isinstance(recording, RecordedRoutes)
    assert (recording.layer_ids, recording.num_experts, recording.top_k) == (LAYERS, 8, 2)
    return list(recording.sequences)


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def respond(form: str, routes_TLK: np.ndarray, prompt: int) -> dict[str, Any]:
    """A response in one of the forms in which engines send them; the last token was never fed."""
    counts = usage(prompt, len(routes_TLK) + 1 - prompt)
    all_layers = in_all_layers(routes_TLK, LAYERS, 4, 0)
    if form == "generate":
        return {"text": "…", "meta_info": {**counts, "routed_experts": sglang_text(all_layers)}}
    if form == "sgl_ext":
        return {"choices": [{"text": "…", "sgl_ext": {"routed_experts": sglang_text(all_layers)}}], "usage": counts}
    if form == "split lists":
        generated = [*routes_TLK[prompt:].tolist(), [[0, 0], [0, 0]]]
        choice = {"index": 0, "text": "…", "routed_experts": generated}
        return {"choices": [choice], "prompt_routed_experts": routes_TLK[:prompt].tolist(), "usage": counts}
    rows = all_layers if form == "npy, all layers" else routes_TLK
    choice = {"index": 0, "text": "…", "routed_experts": npy_text(rows, "u1" if form == "npy" else "<i4")}
    return {"choices": [choice], "prompt_routed_experts": None, "usage": counts}


FORMS = {"generate": "sglang", "sgl_ext": "sglang", "split lists": "vllm", "npy": "vllm", "npy, all layers": "vllm"}


@pytest.mark.parametrize("form", FORMS)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4), seed=st.integers(0, 9)
)
@settings(max_examples=15, deadline=None)
def test_every_form_gives_the_routes_back(form: str, lengths: list[tuple[int, int]], seed: int) -> None:
    routes = [random_routes(prompt + new, 2, 8, 2, seed + i) for i, (prompt, new) in enumerate(lengths)]
    lines = [respond(form, routed, prompt) for routed, (prompt, _) in zip(routes, lengths, strict=True)]
    lines[0]["domain"] = "code"
    with tempfile.TemporaryDirectory() as folder:
        sequences = read(FORMS[form], Path(folder), lines)
    assert [sequence.domain for sequence in sequences] == ["code"] + [None] * (len(lines) - 1)
    for sequence, routed, (prompt, _) in zip(sequences, routes, lengths, strict=True):
        np.testing.assert_array_equal(sequence.experts, routed)
        np.testing.assert_array_equal(sequence.position, np.arange(len(routed)))
        np.testing.assert_array_equal(sequence.decode, np.arange(len(routed)) >= prompt)


def test_a_bare_answer_counts_as_prefill_and_a_batch_stands_in_one_line(tmp_path: Path) -> None:
    routes = random_routes(6, 2, 8, 2)
    bare = {"routed_experts": sglang_text(in_all_layers(routes, LAYERS, 4, 0)), "domain": "law"}
    remarks = Remarks()
    sequences = read("sglang", tmp_path, [[bare, respond("generate", routes, 3)]], remarks=remarks)
    assert [sequence.decode.sum() for sequence in sequences] == [0, 3]
    assert sequences[0].domain == "law"
    assert "responses that do not tell their prompt's length, all of them counted as prefill: 1" in remarks.lines()


@pytest.mark.parametrize("form", ["generate", "npy"])
def test_rows_that_were_not_asked_for_shift_the_positions(tmp_path: Path, form: str) -> None:
    routes = random_routes(7, 2, 8, 2)
    line = respond(form, routes[2:], 2)
    (line["meta_info"] if form == "generate" else line["usage"])["prompt_tokens"] += 2
    (sequence,) = read(FORMS[form], tmp_path, [line])
    assert sequence.position.tolist() == [2, 3, 4, 5, 6]
    assert sequence.decode.tolist() == [False, False, True, True, True]


def test_further_choices_leave_the_prompt_to_the_first(tmp_path: Path) -> None:
    prompt = random_routes(3, 2, 8, 2)
    whole = [np.concatenate([prompt, random_routes(new, 2, 8, 2, new)]) for new in (4, 2)]
    counts = {"usage": usage(3, 8)}
    forms = {
        "vllm": {"choices": [{"routed_experts": npy_text(rows)} for rows in whole]},
        "sglang": {
            "choices": [
                {"sgl_ext": {"routed_experts": sglang_text(in_all_layers(rows, LAYERS, 4, 0))}} for rows in whole
            ]
        },
    }
    split = {
        "choices": [{"routed_experts": rows[3:].tolist()} for rows in whole],
        "prompt_routed_experts": prompt.tolist(),
    }
    for engine, line in [*forms.items(), ("vllm", split)]:
        first, second = read(engine, tmp_path, [line | counts])
        np.testing.assert_array_equal(first.experts, whole[0])
        np.testing.assert_array_equal(second.experts, whole[1][3:])
        assert second.position.tolist() == [3, 4]
        assert second.decode.all()


def test_tokens_that_no_router_saw_are_cut(tmp_path: Path) -> None:
    routes = random_routes(6, 2, 8, 2)
    holes = routes.copy()
    holes[0], holes[5] = 0, -1
    line = {"choices": [{"routed_experts": npy_text(holes, "<i2")}], "usage": usage(4, 3)}
    remarks = Remarks()
    (sequence,) = read("vllm", tmp_path, [line], remarks=remarks)
    np.testing.assert_array_equal(sequence.experts, routes[1:5])
    assert sequence.position.tolist() == [1, 2, 3, 4]
    assert remarks.lines() == ["tokens without routes cut: 2"]


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        ("sglang", {"routed_experts": "€"}, "not base64 of int32"),
        ("sglang", {"routed_experts": "AAA="}, "not base64 of int32"),
        ("sglang", {"routed_experts": "AAAAAA=="}, "expected a multiple of 4 layers times 2 experts"),
        ("sglang", {"routed_experts": [1]}, "expected base64 text"),
        ("sglang", {"routed_experts": None}, "--enable-return-routed-experts"),
        ("sglang", {"prompt_tokens": 1, "completion_tokens": 1}, "routes of 4 tokens, but 1 were fed"),
        ("sglang", {"prompt_tokens": -1}, "prompt_tokens is -1"),
        ("sglang", {"domain": 3}, "domain is 3"),
        ("sglang", {"choices": []}, "choices is"),
        ("vllm", {"routed_experts": None}, "--enable-return-routed-experts"),
        ("vllm", {"routed_experts": "AAAA"}, "not base64 of a .npy file"),
        ("vllm", {"routed_experts": []}, "is empty"),
        ("vllm", {"routed_experts": [[1, 2], [3]]}, "expected integers"),
        ("vllm", {"routed_experts": [[1.5]]}, "expected integers"),
        ("vllm", {"routed_experts": [[1]]}, "expected \\[tokens, layers"),
        ("vllm", {"prompt_routed_experts": [[[1, 2]]]}, "differ in layers"),
        ("vllm", {"routed_experts": [[[1, 2, 3], [1, 2, 3]]]}, "3 experts per token, expected 2"),
        ("vllm", {"routed_experts": [[[1, 2]] * 3]}, "has 3 rows of layers"),
        ("vllm", {"routed_experts": [[[1, 2]] * 4]}, "routes in layer 0, which is not MoE in m"),
        ("vllm", {"routed_experts": [[[1, 2], [8, 1]]]}, "expert 8 in layer 3, expected 0 to 7"),
        ("vllm", {"routed_experts": [[[1, 2], [4, 4]]]}, "expert 4 twice for one token in layer 3"),
    ],
)
def test_damaged_responses_are_refused(tmp_path: Path, engine: str, change: dict[str, Any], message: str) -> None:
    routes = random_routes(4, 2, 8, 2)
    text = sglang_text(in_all_layers(routes, LAYERS, 4, 0)) if engine == "sglang" else npy_text(routes)
    sound = {"routed_experts": text}
    read(engine, tmp_path, [sound])
    with pytest.raises(RecordingError, match=message) as refused:
        read(engine, tmp_path, [sound, sound | change])
    assert "line 2" in str(refused.value)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_what_responses_do_not_tell_must_be_given(tmp_path: Path, engine: str) -> None:
    with pytest.raises(RecordingError, match="--layers"):
        read(engine, tmp_path, [{}], ModelFacts("m", 8, 2))
    with pytest.raises(RecordingError, match="empty" if engine == "vllm" else "no routes"):
        read(engine, tmp_path, [])


def statistics(load: np.ndarray, map_RP: np.ndarray, step: int = 0) -> dict[str, Any]:
    head = {"record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2}
    return head | {"expert_load": load.tolist(), "p2l_map": map_RP.tolist()}


@given(steps=st.lists(st.integers(1, 6), min_size=1, max_size=3), num_copies=st.integers(0, 4), seed=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_load_statistics_add_each_through_its_own_map(steps: list[int], num_copies: int, seed: int) -> None:
    lines: list[Any] = [{"record_type": "eplb_load_meta", "version": 1, "model": "m"}]
    expected = np.zeros((2, 4), int)
    for step, num_tokens in enumerate(steps):
        map_RP = slot_map(2, 4, num_copies, seed + step)
        routes = random_routes(num_tokens, 2, 4, 2, seed + step)
        lines.append(statistics(count_routes(to_slots(routes, map_RP, (0, 1)), 4 + num_copies), map_RP, step))
        expected += count_routes(routes, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = write_lines(Path(folder) / "s.jsonl", lines)
        recording = IMPORTERS["vllm"]([path], ModelFacts("m", 4, 2, LAYERS), Remarks())
    assert isinstance(recording, RecordedCounts)
    assert recording.layer_ids == LAYERS
    np.testing.assert_array_equal(recording.counts, expected)


@pytest.mark.parametrize(
    ("record", "facts", "message"),
    [
        (statistics(np.ones((2, 4), int), np.zeros((2, 5), int)), FACTS, "differ, expected both"),
        (statistics(-np.ones((2, 4), int), slot_map(2, 4, 0)), FACTS, "count -1"),
        (statistics(np.ones((2, 4), int), slot_map(2, 4, 0) - 1), FACTS, "a slot holds expert -1"),
        (statistics(np.ones((2, 4), int), slot_map(2, 4, 0)), FACTS, "num_experts is 4, m has 8"),
        (statistics(np.ones((3, 8), int), slot_map(3, 8, 0)), FACTS, "has 3 rows of layers"),
        (statistics(np.ones((2, 8), int), slot_map(2, 8, 0)), ModelFacts("m"), "--layers"),
        (statistics(np.ones((2, 8), int), slot_map(2, 8, 0)) | {"version": 2}, FACTS, "version 2"),
        ({"record_type": "eplb_load_meta"}, FACTS, "no record of type eplb_load_stats"),
    ],
)
def test_load_statistics_that_do_not_fit_are_refused(
    tmp_path: Path, record: dict[str, Any], facts: ModelFacts, message: str
) -> None:
    with pytest.raises(RecordingError, match=message):
        IMPORTERS["vllm"]([write_lines(tmp_path / "s.jsonl", [record])], facts, Remarks())
