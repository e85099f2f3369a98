"""``GET /v1/placement`` and ``/v1/placement/load``: where the experts are, and what they have to do now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel

from placement.plan import PlacementPlan
from runtime.load import active_experts, balancedness, slots_as_lists
from runtime.requests import EngineProtocol, StepTime
from runtime.step_meter import MeterReading, StepMeter


class Placement:
    """What is served.

    Args:
        plan: says where the experts are.
        meter: of the engine that serves it.
        exchange: mode in which the ranks exchange hidden states; None takes the plan's.
    """

    def __init__(self, plan: PlacementPlan, meter: StepMeter, exchange: str | None = None) -> None:
        self.plan, self.meter = plan, meter
        self.exchange = exchange or plan.workload.exchange
        self._sizes, self._step_us = _predictions(plan.predicted)

    def predicted_step_us(self, num_tokens: int) -> float | None:
        """The plan's prediction for a step's MoE layers, in µs; between batch sizes on a line, None without any."""
        if not self._sizes:
            return None
        return float(np.interp(num_tokens, self._sizes, self._step_us))


def _predictions(predicted: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Batch sizes and the plan's step times, ascending; a plan is a file of the user's, and may say anything here."""
    of_plan = predicted.get("step_us")
    of_plan = of_plan.get("plan") if isinstance(of_plan, Mapping) else None
    by_size = of_plan if isinstance(of_plan, Mapping) else {"1": of_plan}
    pairs = []
    for size, step_us in by_size.items():
        if str(size).isdecimal() and isinstance(step_us, int | float) and not isinstance(step_us, bool):
            pairs.append((float(size), float(step_us)))
    sizes, times = zip(*sorted(pairs), strict=True) if pairs else ((), ())
    return list(sizes), list(times)


class PlacementAnswer(BaseModel):
    """What ``/v1/placement`` says; ``slots[layer][gpu]`` are logical expert ids."""

    model: str
    strategy: str
    layer_ids: list[int]
    num_experts: int
    top_k: int
    gpus: int
    slots: list[list[list[int]]]
    dispatch: dict[str, Any]
    predicted: dict[str, Any]
    copy_of: str | None = None


class StepTimes(BaseModel):
    """Times of the last decode steps, in ms; null before the first."""

    median: float | None
    p95: float | None


class LoadAnswer(BaseModel):
    """What ``/v1/placement/load`` says; lists are by layer, GPU and slot."""

    steps: int
    step_ms: StepTimes
    predicted_step_us: float | None
    tokens_per_s: float
    running: int
    waiting: int
    tokens: list[list[list[int]]]
    active: list[list[float]]
    balancedness: list[float]


def placement_router(placement: Placement, engine: EngineProtocol, model_name: str) -> APIRouter:
    """The routes, for one plan."""
    router = APIRouter()
    plan = placement.plan.to_dict()
    answer = PlacementAnswer(
        model=model_name,
        gpus=placement.plan.num_gpus,
        **{name: plan[name] for name in ("strategy", "layer_ids", "num_experts", "top_k", "slots", "dispatch")},
        predicted=plan["predicted"],
    )

    @router.get("/v1/placement")
    async def read_placement() -> PlacementAnswer:
        """Which experts each GPU holds in every MoE layer."""
        return answer

    @router.get("/v1/placement/load")
    async def read_load() -> LoadAnswer:
        """What the slots had to do in the last seconds, and how fast the steps were."""
        status = engine.status()
        reading = placement.meter.read()
        return LoadAnswer(
            steps=status.decode_steps,
            step_ms=_step_times(status.step_times),
            predicted_step_us=placement.predicted_step_us(status.running),
            tokens_per_s=reading.tokens_per_s,
            running=status.running,
            waiting=status.waiting,
            **_by_slot(placement.plan, reading),
        )

    return router


def _step_times(steps: Sequence[StepTime]) -> StepTimes:
    """Of those that fed no prompts beside, as a prompt's length would hide what the placement does."""
    times = [1000 * step.seconds for step in steps if not step.prompt_tokens]
    if not times:
        return StepTimes(median=None, p95=None)
    return StepTimes(median=float(np.median(times)), p95=float(np.quantile(times, 0.95)))


def _by_slot(plan: PlacementPlan, reading: MeterReading) -> dict[str, Any]:
    """Tokens, active experts and balancedness of the window; where nothing ran, no tokens and perfect balance."""
    load = reading.recent
    if load is None:
        return {
            "tokens": [[[0] * len(gpu) for gpu in layer] for layer in plan.slots],
            "active": [[0.0] * plan.num_gpus for _ in plan.slots],
            "balancedness": [1.0] * plan.num_layers,
        }
    return {
        "tokens": slots_as_lists(load.pairs, plan.slots),
        "active": active_experts(load).tolist(),
        "balancedness": balancedness(load).tolist(),
    }
