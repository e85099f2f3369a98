"""Checks of what a placement problem is made of: counts, routes and a running plan that fit each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.errors import PlanError, ProblemError
from placement.slots import Slots, check_slots, is_int
from profiler.statistics import RoutingStatistics


def check_statistics(statistics: RoutingStatistics) -> None:
    """Refuse counts that no trace can have; affinity and co-activation may be empty (counts alone).

    Raises:
        ProblemError: a count is negative or no integer (NaN is none), or shapes do not belong together.
    """
    shape = np.shape(statistics.popularity)
    if len(shape) != 2 or 0 in shape:
        raise ProblemError(f"popularity has the shape {list(shape)}: expected [layers, experts], at least one of each")
    layers, experts = shape
    for name, expected, may_be_empty in (
        ("popularity", (layers, experts), False),
        ("top1_popularity", (layers, experts), False),
        ("affinity", (layers - 1, experts, experts), True),
        ("top1_affinity", (layers - 1, experts, experts), True),
        ("coactivation", (layers, experts, experts), True),
    ):
        counts = np.asarray(getattr(statistics, name))
        if counts.shape != expected and not (may_be_empty and counts.size == 0):
            raise ProblemError(f"{name} has the shape {list(counts.shape)}, expected {list(expected)}: count again")
        if counts.dtype.kind not in "iu":
            raise ProblemError(f"{name} holds {counts.dtype} values, expected integers: count again")
        if counts.size and counts.min() < 0:
            raise ProblemError(f"{name} holds a negative count ({counts.min()}): record the trace again")


def check_routes(routes: NDArray[np.integer], num_layers: int, num_experts: int) -> None:
    """Refuse routes that do not fit the statistics.

    Args:
        routes: [T, L, K], expert ids.
        num_layers, num_experts: L, E.

    Raises:
        ProblemError: another number of dimensions or layers, no integers, or ids out of range.
    """
    if (
        routes.ndim != 3
        or routes.shape[1] != num_layers
        or routes.dtype.kind not in "iu"
        or (routes.size and not 0 <= routes.min() <= routes.max() < num_experts)
    ):
        raise ProblemError(
            f"routes {list(routes.shape)} {routes.dtype}: expected integers [tokens, {num_layers}, choices] from 0 to "
            f"{num_experts - 1}, from the trace that the statistics are of"
        )


def check_running(
    running: Slots | None, max_moves: int | None, num_layers: int, num_experts: int, slots_per_gpu: Sequence[int]
) -> None:
    """Refuse a running plan that does not fit the problem.

    Args:
        running: slots of the plan being served, or None.
        max_moves: copies that may be moved, or None for any number.
        num_layers, num_experts: L, E.
        slots_per_gpu: of the problem.

    Raises:
        ProblemError: it is for other layers, experts or GPUs, or holds more than the slots; or ``max_moves`` is no
            integer of at least 0, or given without a running plan.
    """
    if max_moves is not None and (not is_int(max_moves) or max_moves < 0):
        raise ProblemError(f"max_moves {max_moves!r}: expected null or an integer of at least 0")
    if running is None:
        if max_moves is not None:
            raise ProblemError(f"max_moves {max_moves} without a running plan: give the plan that is being served")
        return
    try:
        check_slots(running, num_experts, range(num_layers))
    except PlanError as error:
        raise ProblemError(f"the running plan does not fit the statistics: {error}") from None
    if len(running[0]) != len(slots_per_gpu):
        raise ProblemError(
            f"the running plan is for {len(running[0])} GPUs, slots_per_gpu for {len(slots_per_gpu)}: solve without it"
        )
    most = [max(len(layer[gpu]) for layer in running) for gpu in range(len(slots_per_gpu))]
    if any(held > slots for held, slots in zip(most, slots_per_gpu, strict=True)):
        raise ProblemError(
            f"the running plan needs slots_per_gpu {most}, given are {list(slots_per_gpu)}: give as many"
        )
