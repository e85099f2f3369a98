"""Contiguous placement: what serving engines do by default."""

from __future__ import annotations

import time
from collections.abc import Sequence

from placement.plan import PlacementPlan, Workload
from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import Slots, even_slots, share_experts


def solve_contiguous(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Experts in order of id, whatever the objective."""
    started = time.perf_counter()
    slots = contiguous_slots(problem.num_layers, problem.num_experts, problem.slots_per_gpu)
    return Solution.of(problem, slots, "contiguous", started)


def contiguous_slots(num_layers: int, num_experts: int, slots_per_gpu: Sequence[int]) -> Slots:
    """Experts in order of id, one copy each; spare slots stay empty."""
    counts = share_experts(num_experts, slots_per_gpu)
    starts = [sum(counts[:gpu]) for gpu in range(len(counts))]
    layer = tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))
    return (layer,) * num_layers


def contiguous_plan(
    model: str,
    num_experts: int,
    top_k: int,
    layer_ids: Sequence[int],
    num_gpus: int,
    workload: Workload | None = None,
    model_fingerprint: str | None = None,
) -> PlacementPlan:
    """A plan that needs no trace: expert e on GPU e // (E / G), one copy each.

    Args:
        model: hub id or path, as in ``PlacementPlan``.
        num_experts, top_k, layer_ids: the model's shape.
        num_gpus: G.
        workload: what is served (default: decode, exchange ``allreduce``).
        model_fingerprint: of the model's configuration, where known.
    """
    return PlacementPlan(
        model=model,
        model_fingerprint=model_fingerprint,
        num_experts=num_experts,
        top_k=top_k,
        layer_ids=tuple(layer_ids),
        slots=contiguous_slots(len(layer_ids), num_experts, even_slots(num_experts, num_gpus)),
        workload=workload or Workload(),
        strategy="contiguous",
        objective={"name": "none", "settings": {}},
    )
