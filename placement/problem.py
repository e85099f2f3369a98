"""The placement problem: what was counted, how many slots each GPU has, and what to optimise.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.metrics import even_locality, layer_loads
from placement.slots import Slots, even_slots, is_int
from profiler.statistics import RoutingStatistics

ObjectiveName = Literal["locality", "balance"]
Pairs = Literal["all", "top1"]
Backend = Literal["auto", "highs", "cbc"]

#: Loads are sums of shares 1/copies: a bound holds up to this relative rounding error.
LOAD_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Objective:
    """What to optimise.

    Attributes:
        name: ``locality`` maximises the share of transitions between adjacent layers that stay on a GPU, copies
            sharing an expert's tokens evenly; ``balance`` minimises the mean over layers of the busiest GPU's load.
        pairs: count all K×K choices of adjacent layers and all K choices as load, or first choices alone.
        max_load: with ``locality``, bound on every layer's busiest GPU / mean GPU; None for none.
    """

    name: ObjectiveName = "locality"
    pairs: Pairs = "all"
    max_load: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ObjectiveName):
            raise ProblemError(f"objective {self.name!r}: expected one of {list(get_args(ObjectiveName))}")
        if self.pairs not in get_args(Pairs):
            raise ProblemError(f"objective.pairs {self.pairs!r}: expected one of {list(get_args(Pairs))}")
        bound = self.max_load
        if bound is None:
            return
        if self.name == "balance":
            raise ProblemError("objective balance takes no max_load: it already finds the least; remove max_load")
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound) or bound < 1:
            raise ProblemError(f"objective.max_load {bound!r}: expected null or a number of at least 1 (1.0 is even)")

    def to_dict(self) -> dict[str, Any]:
        """As the plan stores it: name and settings."""
        settings = {key: value for key, value in asdict(self).items() if key != "name"}
        return {"name": self.name, "settings": settings}


@dataclass(frozen=True)
class SolverSettings:
    """How long and how hard to search.

    Attributes:
        seed: of everything random.
        time_limit_s: for all integer programs of one solve together; the rest takes a time set by the problem's size.
        backend: ``highs``, ``cbc``, or ``auto`` (HiGHS where installed, else CBC).
        threads: of the integer programs; with 1 they are deterministic as long as no time limit is hit.
        search_rounds: rounds of the annealing search.
    """

    seed: int = 0
    time_limit_s: float = 60.0
    backend: Backend = "auto"
    threads: int = 1
    search_rounds: int = 600

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ProblemError(f"solver.backend {self.backend!r}: expected one of {list(get_args(Backend))}")
        for name, value, least in (
            ("seed", self.seed, 0),
            ("threads", self.threads, 1),
            ("search_rounds", self.search_rounds, 1),
        ):
            if not is_int(value) or value < least:
                raise ProblemError(f"solver.{name} {value!r}: expected an integer of at least {least}")
        limit = self.time_limit_s
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise ProblemError(f"solver.time_limit_s {limit!r}: expected a number of seconds above 0")


@dataclass(frozen=True)
class PlacementProblem:
    """A placement problem, as every strategy takes it.

    Attributes:
        statistics: counts over the tokens to solve on.
        slots_per_gpu: slots of each GPU in every layer, in all at least E.
        objective: what to optimise.

    Raises:
        ProblemError: there are fewer slots than experts, or counts are negative.
    """

    statistics: RoutingStatistics
    slots_per_gpu: tuple[int, ...]
    objective: Objective

    def __post_init__(self) -> None:
        if not self.slots_per_gpu or any(not is_int(slots) or slots < 0 for slots in self.slots_per_gpu):
            raise ProblemError(f"slots_per_gpu {list(self.slots_per_gpu)}: expected an integer of at least 0 per GPU")
        if sum(self.slots_per_gpu) < self.num_experts:
            raise ProblemError(
                f"{sum(self.slots_per_gpu)} slots on {self.num_gpus} GPUs are too few for {self.num_experts} experts: "
                "give more slots_per_gpu, or more GPUs"
            )
        if max(self.slots_per_gpu) > self.num_experts:
            raise ProblemError(
                f"slots_per_gpu {max(self.slots_per_gpu)}: expected at most {self.num_experts}, the number of experts"
            )
        for counts in (self.loads, self.transitions):
            if counts.size and counts.min() < 0:
                raise ProblemError(f"the statistics hold a negative count ({counts.min()}): record the trace again")

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.statistics.popularity.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.statistics.popularity.shape[1])

    @property
    def num_gpus(self) -> int:
        """G."""
        return len(self.slots_per_gpu)

    @cached_property
    def loads(self) -> NDArray[np.int64]:
        """Token–expert pairs that count as load, int64 [L, E]."""
        stats = self.statistics
        return stats.popularity if self.objective.pairs == "all" else stats.top1_popularity

    @cached_property
    def transitions(self) -> NDArray[np.int64]:
        """Transitions between experts of adjacent layers that count, int64 [L-1, E, E]."""
        return self.statistics.affinity if self.objective.pairs == "all" else self.statistics.top1_affinity

    @cached_property
    def load_limits(self) -> NDArray[np.float64] | None:
        """Most load a GPU may have in each layer, float64 [L], or None where nothing bounds it."""
        if self.objective.max_load is None:
            return None
        return self.loads.sum(axis=1) / self.num_gpus * self.objective.max_load * (1 + LOAD_TOLERANCE)

    def value(self, slots: Slots) -> float:
        """The objective's value: locality in [0, 1] (higher is better) or mean busiest load (lower is better)."""
        if self.objective.name == "locality":
            return even_locality(slots, self.transitions)
        return float(layer_loads(slots, self.loads).mean())

    def within_load_bound(self, slots: Slots) -> bool:
        """Whether every layer's busiest GPU keeps to ``max_load``."""
        bound = self.objective.max_load
        return bound is None or bool((layer_loads(slots, self.loads) <= bound * (1 + LOAD_TOLERANCE)).all())


@dataclass(frozen=True)
class Solution:
    """What a strategy found.

    Attributes:
        slots: the placement.
        value: the problem's objective of it, on the tokens solved on.
        bound: no placement with these slots can be better than this (above the value for locality, below it for
            balance); None where none is known.
        gap: |bound − value| / max(|value|, 1e-12), or None.
        seconds: time the strategy took.
        name: of the strategy.
        optimal: whether the value is proven optimal.
        notes: one line per remark worth printing.
    """

    slots: Slots
    value: float
    bound: float | None
    gap: float | None
    seconds: float
    name: str
    optimal: bool
    notes: tuple[str, ...] = ()


def slot_budget(
    cluster: Cluster,
    num_experts: int,
    num_layers: int,
    slots_per_gpu: int | Sequence[int] | None,
    expert_bytes: int | None,
) -> tuple[int, ...]:
    """Slots of each GPU and layer, checked against the memory of each GPU.

    Args:
        cluster: its GPUs and their memory for experts.
        num_experts, num_layers: E, L.
        slots_per_gpu: None for exactly one copy of each expert, one number for all GPUs, or one per GPU.
        expert_bytes: bytes of one expert in one layer, or None where unknown (then memory is not checked).

    Raises:
        ProblemError: a wrong number of entries, or more slots than a GPU's memory holds.
    """
    num_gpus = cluster.num_gpus
    budget: list[int]
    if slots_per_gpu is None:
        budget = even_slots(num_experts, num_gpus)
    elif is_int(slots_per_gpu):
        budget = [slots_per_gpu] * num_gpus
    else:
        budget = list(slots_per_gpu) if isinstance(slots_per_gpu, list | tuple) else []
        if len(budget) != num_gpus:
            raise ProblemError(
                f"slots_per_gpu {slots_per_gpu!r}: expected null, an integer, or a list of {num_gpus}, one per GPU"
            )
    for gpu, (slots, memory) in enumerate(zip(budget, cluster.expert_memory_bytes, strict=True)):
        if expert_bytes is None or not is_int(slots):
            continue
        slot_bytes = expert_bytes * num_layers
        if slots * slot_bytes > memory:
            raise ProblemError(
                f"GPU {gpu} has {memory:.4g} bytes for experts, room for {memory // slot_bytes:.0f} slots; "
                f"{slots} slots in {num_layers} layers need {slots * slot_bytes:.4g} bytes, and one copy of each "
                f"expert takes {num_experts} slots over all GPUs: give fewer slots_per_gpu, more "
                "cluster.expert_memory_bytes, or more GPUs"
            )
    return tuple(budget)
