"""`/v1/placement` and `/v1/placement/load`: the plan, and the load of the window by layer, GPU and slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from placement.plan import Dispatch, PlacementPlan
from runtime.load import Load
from runtime.requests import StepTime
from runtime.server import Placement
from runtime.step_meter import StepMeter
from tests.runtime.server.scripted_engine import ScriptedEngine

PLAN = PlacementPlan(
    model="team/demo",
    num_experts=4,
    top_k=2,
    layer_ids=(1, 3),
    slots=(((0, 1, 2), (3, 0)), ((1, 3), (2, 0))),
    dispatch=Dispatch(split_above_tokens=64),
    strategy="step_time",
    predicted={"step_us": {"plan": {"1": 100.0, "8": 170.0}, "contiguous": {"1": 120.0, "8": 200.0}}},
)
LOAD = Load(
    pairs=torch.tensor([[[4, 2, 0], [1, 1, 0]], [[3, 1, 0], [2, 2, 0]]]),
    active=torch.tensor([[[2, 1, 0], [1, 1, 0]], [[2, 1, 0], [1, 2, 0]]]),
    steps=2,
)


def test_plan_and_load(serve: Callable[..., Any], tokenizer: Any) -> None:
    meter = StepMeter(lambda: LOAD)
    server = serve(tokenizer, ScriptedEngine(), placement=Placement(PLAN, meter))
    answer = server.http.get("/v1/placement").json()
    assert answer == {
        "model": "team/demo",
        "strategy": "step_time",
        "layer_ids": [1, 3],
        "num_experts": 4,
        "top_k": 2,
        "gpus": 2,
        "slots": [[[0, 1, 2], [3, 0]], [[1, 3], [2, 0]]],
        "dispatch": {"rule": "level", "split_above_tokens": 64},
        "predicted": {"step_us": {"plan": {"1": 100.0, "8": 170.0}, "contiguous": {"1": 120.0, "8": 200.0}}},
        "copy_of": None,
    }
    idle = server.http.get("/v1/placement/load").json()
    assert idle == {
        "steps": 0,
        "step_ms": {"median": None, "p95": None},
        "predicted_step_us": 100.0,
        "tokens_per_s": 0.0,
        "running": 0,
        "waiting": 0,
        "tokens": [[[0, 0, 0], [0, 0]], [[0, 0], [0, 0]]],
        "active": [[0.0, 0.0], [0.0, 0.0]],
        "balancedness": [1.0, 1.0],
    }
    for step_s in (0.004, 0.002, 0.003):
        meter.stepped(StepTime(step_s, batch=3), num_tokens=3)
    meter.idle()
    times = tuple(StepTime(step_s, 3, fed) for step_s, fed in ((0.004, 0), (0.002, 0), (0.5, 70), (0.003, 0)))
    server.engine.state = {"running": 8, "waiting": 5, "decode_steps": 4, "step_times": times}
    busy = server.http.get("/v1/placement/load").json()
    assert [busy[name] for name in ("steps", "running", "waiting")] == [4, 8, 5]
    assert busy["step_ms"] == {"median": 3.0, "p95": pytest.approx(3.9)}
    assert busy["predicted_step_us"] == 170.0
    assert busy["tokens_per_s"] == 9.0  # a window shorter than a second counts as one
    assert busy["tokens"] == [[[4, 2, 0], [1, 1]], [[3, 1], [2, 2]]]
    assert busy["active"] == [[1.5, 1.0], [1.5, 1.5]]
    assert busy["balancedness"] == [pytest.approx(4 / 6), 1.0]


def test_without_a_plan_there_are_no_such_routes(server: Any) -> None:
    assert server.http.get("/v1/placement").status_code == 404


@pytest.mark.parametrize(
    ("predicted", "tokens", "expected"),
    [
        ({"step_us": {"plan": {"1": 100.0, "8": 170.0}}}, 4, 130.0),
        ({"step_us": {"plan": {"8": 170.0, "1": 100.0}}}, 64, 170.0),
        ({"step_us": {"plan": 55.5}}, 9, 55.5),
        ({}, 1, None),
        ({"step_us": "soon"}, 1, None),
        ({"step_us": {"plan": {"one": 3, "2": "x", "4": True}}}, 1, None),
    ],
)
def test_prediction_by_batch_size(predicted: dict[str, Any], tokens: int, expected: float | None) -> None:
    plan = PlacementPlan("m", 4, 2, (0,), (((0, 1), (2, 3)),), predicted=predicted)
    assert Placement(plan, StepMeter(lambda: None)).predicted_step_us(tokens) == expected
