"""The placement plan: round trips, and refusal of everything inconsistent."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import PlanError
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.strategies.contiguous import contiguous_plan
from profiler.errors import InputError


@st.composite
def plans(draw):
    num_layers, num_experts, num_gpus = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    slots = []
    for _ in range(num_layers):
        gpus = [set() for _ in range(num_gpus)]
        for expert in range(num_experts):
            for gpu in draw(st.sets(st.integers(0, num_gpus - 1), min_size=1)):
                gpus[gpu].add(expert)
        slots.append(tuple(tuple(draw(st.permutations(sorted(gpu)))) for gpu in gpus))
    first = draw(st.integers(0, 3))
    return PlacementPlan(
        model=draw(st.text(min_size=1)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        layer_ids=tuple(range(first, first + num_layers)),
        slots=tuple(slots),
        model_fingerprint=draw(st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)),
        workload=Workload("prefill", (draw(st.integers(1, 512)),), draw(st.sampled_from(["allreduce", "alltoall"]))),
        dispatch=Dispatch(split_above_tokens=draw(st.none() | st.integers(0, 100))),
        predicted={"step_us": {"plan": draw(st.floats(allow_nan=False, allow_infinity=False))}},
        objective={"name": "locality", "settings": {"max_load": None}},
    )


@given(plans())
def test_round_trip(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan.save(path)
    assert PlacementPlan.load(path) == plan
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]


@given(plans())
def test_copies_are_where_the_slots_say(plan):
    for layer, gpus in enumerate(plan.slots):
        copies = plan.copies(layer)
        assert copies.dtype == np.int32
        for expert, row in enumerate(copies):
            holders = [gpu for gpu, held in enumerate(gpus) if expert in held]
            assert row.tolist() == holders + [-1] * (copies.shape[1] - len(holders))
    assert plan.has_copies == any(sum(map(len, gpus)) > plan.num_experts for gpus in plan.slots)


def test_unknown_keys_are_ignored(tmp_path):
    plan = contiguous_plan("model", 4, 2, [1, 2], 2)
    document = plan.to_dict()
    document["novelty"] = document["workload"]["novelty"] = 1
    assert PlacementPlan.from_dict(document) == plan


def test_contiguous_plan_with_uneven_shares():
    assert contiguous_plan("model", 5, 1, [0], 2).slots == (((0, 1, 2), (3, 4)),)
    assert contiguous_plan("model", 2, 1, [0], 4).slots == (((0,), (1,), (), ()),)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "something", "format"),
        ("version", 2, "version 2"),
        ("model", 7, "model 7"),
        ("num_experts", 0, "num_experts 0"),
        ("num_experts", True, "num_experts True"),
        ("top_k", 5, "top_k 5"),
        ("layer_ids", [2, 1], "layer_ids"),
        ("layer_ids", [1, 1], "layer_ids"),
        ("layer_ids", "12", "layer_ids"),
        ("layer_ids", [1], "slots has 2 layers"),
        ("slots", [[[0, 1], [2, 3]]], "slots has 1 layers"),
        ("slots", [[], []], "no GPU"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1, 2, 3]]], "lists 1 GPUs"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1], [2, 4]]], "expert 4"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1], [2, -1]]], "expert -1"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1], [2, [3]]]], "expert"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1], [2, 2, 3]]], "twice"),
        ("slots", [[[0, 1], [2, 3]], [[0, 1], [0, 2]]], "expert 3 is on no GPU"),
        ("slots", 3, "slots"),
        ("workload", {"exchange": "telepathy"}, "exchange 'telepathy'"),
        ("workload", {"phase": "rest"}, "phase 'rest'"),
        ("workload", {"batch_sizes": [0]}, "batch_sizes"),
        ("workload", {"batch_sizes": 8}, "batch_sizes"),
        ("workload", [], "workload"),
        ("dispatch", {"rule": "random"}, "rule 'random'"),
        ("dispatch", {"split_above_tokens": -1}, "split_above_tokens"),
        ("cluster", {"nodes": 2, "gpus_per_node": 4}, "2 nodes of 4"),
        ("model_fingerprint", 5, "model_fingerprint"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(tmp_path, key, value, message):
    document = contiguous_plan("model", 4, 2, [1, 2], 2).to_dict()
    document[key] = value
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError) as caught:
        PlacementPlan.load(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "num_experts", "top_k", "layer_ids", "slots"])
def test_a_missing_key_is_named(key):
    document = contiguous_plan("model", 4, 2, [1, 2], 2).to_dict()
    del document[key]
    with pytest.raises(PlanError, match=f"'{key}' is missing"):
        PlacementPlan.from_dict(document)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        PlacementPlan.load(path)


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    plan = contiguous_plan("model", 4, 2, [1, 2], 2)
    with pytest.raises(InputError, match="cannot write"):
        plan.save(tmp_path / "missing" / "plan.json")
    broken = replace(plan, predicted={"step_us": float("nan")})
    with pytest.raises(ValueError, match=r"JSON compliant"):
        broken.save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


def test_model_path_is_relative_to_the_plan(tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    plan = contiguous_plan("models/tiny", 4, 2, [0], 2)
    assert plan.resolve_model(tmp_path / "plan.json") == str(tmp_path / "models" / "tiny")
    assert replace(plan, model="hub/name").resolve_model(tmp_path / "plan.json") == "hub/name"


def test_another_model_is_refused():
    plan = contiguous_plan("model", 4, 2, [1, 2], 2, model_fingerprint="a" * 64)
    plan.check_model(4, 2, (1, 2), "a" * 64)
    plan.check_model(4, 2, [1, 2], None)
    for wrong in [(8, 2, [1, 2], None), (4, 1, [1, 2], None), (4, 2, [0, 1], None), (4, 2, [1, 2], "b" * 64)]:
        with pytest.raises(PlanError, match="the plan"):
            plan.check_model(*wrong)
