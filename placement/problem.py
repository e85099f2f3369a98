"""The placement problem: what was counted, how many slots each GPU has, and what to optimise.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from placement.checks import check_routes, check_running, check_statistics
from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.metrics import even_locality, layer_loads
from placement.plan import Dispatch, Workload
from placement.slots import Slots, is_int
from profiler.statistics import RoutingStatistics

if TYPE_CHECKING:
    from placement.sampled_steps import SampledSteps

#: Called with one line now and then.
Progress = Callable[[str], None]

ObjectiveName = Literal["step_time", "locality", "balance"]
Pairs = Literal["all", "top1"]
Backend = Literal["auto", "highs", "cbc"]

#: Of the steps that ``step_time`` is estimated on, the same for every strategy.
SAMPLE_SEED = 1
#: Loads are sums of shares 1/copies: a bound holds up to this relative rounding error.
LOAD_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Objective:
    """What to optimise.

    Attributes:
        name: ``step_time`` minimises the expected time of the workload's steps on the cluster, in µs; ``locality``
            maximises the share of transitions between adjacent layers that stay on a GPU, copies sharing an expert's
            tokens evenly; ``balance`` minimises the mean over layers of the busiest GPU's load.
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
        if self.name != "locality":
            raise ProblemError(f"objective {self.name} takes no max_load: it weighs loads itself; remove max_load")
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
        time_limit_s: of one solve.
        backend: ``highs``, ``cbc``, or ``auto`` (HiGHS where installed, else CBC).
        threads: of the integer programs; with 1 they are deterministic as long as no time limit is hit.
        workers: layers or chains searched side by side; the plan does not depend on it.
        search_rounds: how long searches go on where no time limit ends them.
    """

    seed: int = 0
    time_limit_s: float = 60.0
    backend: Backend = "auto"
    threads: int = 1
    workers: int = 2
    search_rounds: int = 600

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ProblemError(f"solver.backend {self.backend!r}: expected one of {list(get_args(Backend))}")
        for name, value, least in (
            ("seed", self.seed, 0),
            ("threads", self.threads, 1),
            ("workers", self.workers, 1),
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
        cluster: its topology, links and coefficients; None where only counts matter (then one node is assumed).
        routes: [T, L, K], the tokens solved on, for objectives that replay them; None where only counts are known.
        sequences: int [T], the sequence of each of these tokens; None where unknown.
        workload, dispatch: what is served, and by which rule copies are chosen.
        running: slots of a plan that is being served, to start from; None to start anew.
        max_moves: copies of experts that may be moved from ``running``; None for any number.

    Raises:
        ProblemError: there are fewer slots than experts; counts are negative, no integers, or of shapes that do not
            belong together; locality is asked of counts alone; or cluster, routes or running plan do not fit.
    """

    statistics: RoutingStatistics
    slots_per_gpu: tuple[int, ...]
    objective: Objective
    cluster: Cluster | None = None
    routes: NDArray[np.integer] | None = None
    sequences: NDArray[np.integer] | None = None
    workload: Workload = field(default_factory=Workload)
    dispatch: Dispatch = field(default_factory=Dispatch)
    running: Slots | None = None
    max_moves: int | None = None

    def __post_init__(self) -> None:
        check_statistics(self.statistics)
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
        if self.cluster is not None and self.cluster.num_gpus != self.num_gpus:
            raise ProblemError(
                f"slots_per_gpu is for {self.num_gpus} GPUs, cluster {self.cluster.name} has {self.cluster.num_gpus}: "
                "give one number of slots per GPU of the cluster"
            )
        if self.objective.name == "locality":
            self.require_affinity("objective locality")
        if self.routes is not None:
            check_routes(self.routes, self.num_layers, self.num_experts)
        check_running(self.running, self.max_moves, self.num_layers, self.num_experts, self.slots_per_gpu)

    def require_affinity(self, what: str) -> None:
        """Refuse counts alone, on behalf of ``what`` (for example ``strategy exflow``).

        Raises:
            ProblemError: the statistics tell popularity alone.
        """
        if len(self.statistics.affinity) != self.num_layers - 1:
            raise ProblemError(
                f"{what} needs transitions between layers, the statistics are counts alone: record a trace with "
                "`profiler trace`, or take strategy=eplb or objective=balance"
            )

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

    @property
    def gpus_per_node(self) -> int:
        """GPUs that share the fast links; all of them where no cluster is given."""
        return self.num_gpus if self.cluster is None else self.cluster.gpus_per_node

    @cached_property
    def loads(self) -> NDArray[np.int64]:
        """Token–expert pairs that count as load, int64 [L, E]."""
        stats = self.statistics
        return stats.popularity if self.objective.pairs == "all" else stats.top1_popularity

    @cached_property
    def transitions(self) -> NDArray[np.int64]:
        """Transitions between experts of adjacent layers that count, int64 [L-1, E, E]; none where unknown."""
        counts = self.statistics.affinity if self.objective.pairs == "all" else self.statistics.top1_affinity
        shape = (self.num_layers - 1, self.num_experts, self.num_experts)
        return counts if counts.shape == shape else np.zeros(shape, dtype=np.int64)

    @cached_property
    def load_limits(self) -> NDArray[np.float64] | None:
        """Most load a GPU may have in each layer, float64 [L], or None where nothing bounds it."""
        if self.objective.max_load is None:
            return None
        return self.loads.sum(axis=1) / self.num_gpus * self.objective.max_load * (1 + LOAD_TOLERANCE)

    @cached_property
    def sampled_steps(self) -> SampledSteps:
        """Steps drawn from the routes, for the objective ``step_time``.

        Raises:
            ProblemError: there are no routes, or the cluster has no coefficients.
        """
        from placement.sampled_steps import SampledSteps  # compiles loops: only where it is needed

        if self.routes is None:
            raise ProblemError(
                "objective step_time needs every token's routes, this input has counts alone: trace the model"
            )
        if self.cluster is None or not self.cluster.coefficients:
            raise ProblemError(
                "objective step_time needs a cluster with coefficients: give cluster=, for example h200x4"
            )
        if self.dispatch.rule != "level":
            raise ProblemError(f"objective step_time plans for dispatch.rule level, not {self.dispatch.rule}")
        split_above = self.dispatch.split_above_tokens
        return SampledSteps(
            self.routes, self.num_experts, self.cluster, self.workload, split_above, SAMPLE_SEED, self.sequences
        )

    def value(self, slots: Slots) -> float:
        """The objective's value: locality in [0, 1] (higher is better), mean busiest load or µs (lower is better)."""
        if self.objective.name == "step_time":
            return self.sampled_steps.value(slots)
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
            balance and step time); None where none is known.
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

    @classmethod
    def of(
        cls,
        problem: PlacementProblem,
        slots: Slots,
        name: str,
        started: float,
        bound: float | None = None,
        notes: Sequence[str] = (),
    ) -> Solution:
        """A solution with its value, gap and time; a placement that breaks the load bound is noted.

        Args:
            problem: what was solved.
            slots: the placement found.
            name: of the strategy.
            started: ``time.perf_counter()`` when it began.
            bound: on the problem's value, or None.
            notes: remarks.
        """
        value = problem.value(slots)
        gap = None if bound is None else abs(bound - value) / max(abs(value), 1e-12)
        if not problem.within_load_bound(slots):
            notes = [*notes, f"{name} does not keep to max_load"]
        seconds = time.perf_counter() - started
        return cls(slots, value, bound, gap, seconds, name, gap is not None and gap <= 1e-9, tuple(notes))
