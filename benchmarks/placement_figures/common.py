"""What all groups share: the public trace, clusters, judging, and rows of results.

Shape suffixes: T tokens, L layers, K choices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from benchmarks.placement_generators import count_routes
from placement.cluster import Cluster
from placement.evaluation import evaluate_routes
from placement.memory import SlotRequest, slot_budget
from placement.metrics import Metrics
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, PlacementProblem, Solution, SolverSettings
from placement.slots import Slots
from placement.strategies import solve
from profiler.trace_format import RoutingTrace

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = CHECKOUT / "benchmarks" / "results"

Row = dict[str, Any]
Mask = NDArray[np.bool_]
Say = Callable[[str], None]

#: Experts of gpt-oss-20b in bfloat16: three matrices of 2880 × 2880; and one token's hidden state.
EXPERT_BYTES, HIDDEN_STATE_BYTES = 2880 * 2880 * 3 * 2, 2880 * 2
#: An expert with copies and more tokens in a step is split over them.
SPLIT_ABOVE = 64
#: Steps drawn per batch size, at most.
STEPS = 2000
#: Equal but for rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class PublicTrace:
    """The recorded routing of gpt-oss-20b: routes int [T, L, K], the sequence of every token int [T]."""

    routes: NDArray[np.integer]
    sequences: NDArray[np.integer]
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int

    def half(self, parity: int) -> Mask:
        """Tokens of even (0) or odd (1) sequences."""
        return self.sequences % 2 == parity

    def random_half(self, seed: int) -> Mask:
        """Tokens of a random half of the sequences."""
        ids = np.unique(self.sequences)
        chosen = np.random.default_rng(seed).permutation(ids)[: len(ids) // 2]
        return np.isin(self.sequences, chosen)

    def problem(
        self,
        solved_T: Mask,
        cluster: Cluster,
        slots_per_gpu: SlotRequest,
        objective: Objective,
        workload: Workload | None = None,
        rule: str = "level",
    ) -> PlacementProblem:
        """The problem of some of the tokens; memory is not checked."""
        budget = slot_budget(cluster, self.num_experts, len(self.layer_ids), slots_per_gpu, None)
        routes = self.routes[solved_T]
        return PlacementProblem(
            count_routes(routes, self.num_experts),
            budget,
            objective,
            cluster=cluster,
            routes=routes,
            sequences=self.sequences[solved_T],
            workload=workload or Workload(),
            dispatch=Dispatch(rule, SPLIT_ABOVE),  # type: ignore[arg-type]
        )

    def judge(
        self,
        slots: Slots,
        judged_T: Mask,
        problem: PlacementProblem,
        batch_sizes: Sequence[int],
        rule: str | None = None,
    ) -> Metrics:
        """Replay some of the tokens through a placement, with the problem's cluster, exchange and rule (or another)."""
        assert problem.cluster is not None
        dispatch = problem.dispatch if rule is None else replace(problem.dispatch, rule=rule)  # type: ignore[arg-type]
        plan = PlacementPlan(
            *("gpt-oss-20b", self.num_experts, self.top_k, self.layer_ids, slots),
            workload=problem.workload,
            dispatch=dispatch,
        )
        return evaluate_routes(plan, self.routes[judged_T], problem.cluster, batch_sizes, STEPS)


@lru_cache(maxsize=1)
def public_trace() -> PublicTrace:
    """gpt-oss-20b.safetensors in the folder that EXPERTPLAN_TRACES names (default: ../shared/traces)."""
    folder = Path(os.environ.get("EXPERTPLAN_TRACES", CHECKOUT.parent / "shared" / "traces"))
    with RoutingTrace.open(folder / "gpt-oss-20b.safetensors", validate=False) as trace:
        routes, sequences = trace.experts().copy(), trace.sequence().copy()  # the file is closed below
        return PublicTrace(routes, sequences, trace.layer_ids, trace.num_experts, trace.top_k)


def cluster_of(num_gpus: int) -> Cluster:
    """GPUs of the preset h200x8 in one node, with the coefficients of gpt-oss-20b's experts."""
    one_node = replace(preset("h200x8"), nodes=1, gpus_per_node=num_gpus, expert_memory_bytes=(1e11,) * num_gpus)
    return replace(with_coefficients(one_node), name=f"{num_gpus} H200")


def preset(name: str) -> Cluster:
    """A preset of conf/cluster/."""
    return Cluster.from_dict(yaml.safe_load((CHECKOUT / "conf" / "cluster" / f"{name}.yaml").read_text()))


def with_coefficients(cluster: Cluster) -> Cluster:
    """The cluster with the coefficients of gpt-oss-20b's experts."""
    return replace(cluster, coefficients=(cluster.coefficients_for(EXPERT_BYTES, HIDDEN_STATE_BYTES),))


def extra_slots(percent: int) -> str | None:
    """A budget of one copy of each expert and so many percent more."""
    return f"+{percent}%" if percent else None


def solve_row(strategy: str, problem: PlacementProblem, settings: SolverSettings, say: Say) -> tuple[Solution, Row]:
    """A solution, and what a row says about the problem and how it was solved."""
    solution = solve(strategy, problem, settings, say)
    return solution, describe(problem, settings) | {
        "strategy": strategy,
        "seconds": round(solution.seconds, 3),
        "notes": "; ".join(solution.notes),
    }


def describe(problem: PlacementProblem, settings: SolverSettings) -> Row:
    """What a row says about a problem and the settings it is solved with."""
    return {
        "layers": problem.num_layers,
        "experts": problem.num_experts,
        "gpus": problem.num_gpus,
        "slots": sum(problem.slots_per_gpu),
        "extra_percent": round(100 * (sum(problem.slots_per_gpu) / problem.num_experts - 1)),
        "cluster": None if problem.cluster is None else problem.cluster.name,
        "objective": problem.objective.name,
        "pairs": problem.objective.pairs,
        "max_load": problem.objective.max_load,
        "exchange": problem.workload.exchange,
        "rule": problem.dispatch.rule,
        "split_above_tokens": problem.dispatch.split_above_tokens,
        "seed": settings.seed,
        "time_limit_s": settings.time_limit_s,
        "search_rounds": settings.search_rounds,
    }


def reach(value: float, relation: str, target: float) -> Row:
    """A value with its target: ``relation`` is one of ≥, >, ≤, <; equal but for rounding is equal."""
    slack = ROUNDING * abs(target)
    ok = {
        "≥": value >= target - slack,
        ">": value > target + slack,
        "≤": value <= target + slack,
        "<": value < target - slack,
    }[relation]
    return {"value": value, "relation": relation, "target": target, "ok": bool(ok)}


def bounded(solution: Solution) -> Row:
    """Value, bound and gap on the tokens solved on."""
    return {"value": solution.value, "bound": solution.bound, "gap": solution.gap}
