"""From a trace and settings to a judged plan: what the command line does, without the command line."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes, held_out_experts
from placement.memory import MemoryBudget, SlotRequest, slot_budget
from placement.metrics import Metrics, layer_loads
from placement.migration import Move, align_to, moves_document, num_moves, plan_moves
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, PlacementProblem, Progress, Solution
from placement.settings import SolveSettings, resolve_cluster
from placement.strategies import solve
from profiler.routing_counts import RoutingCounts
from profiler.statistics import RoutingStatistics, collect_statistics
from profiler.trace_format import RoutingTrace, Split

SOLVE_SPLIT: Split = "even"
JUDGE_SPLIT: Split = "odd"


@dataclass(frozen=True)
class SolvedTrace:
    """What ``solve`` found.

    Attributes:
        plan: with its predictions on held-out tokens.
        solution: as the strategy returned it.
        judged: metrics of ``plan``, ``contiguous``, ``eplb`` and, where one was given, ``running``.
        moves: copies to transfer from the running plan, in order; none without one.
    """

    plan: PlacementPlan
    solution: Solution
    judged: dict[str, Metrics]
    moves: list[Move]


def solve_trace(
    trace: RoutingTrace, settings: SolveSettings, output: Path, progress: Progress, running: PlacementPlan | None = None
) -> SolvedTrace:
    """Solve on the even sequences of a trace, judge on its odd ones.

    Args:
        trace: what was routed.
        settings: of ``solve``.
        output: where the plan will be written; the model's path is stored relative to it.
        progress: called with one line now and then.
        running: a plan that is being served, to start from; with ``settings.max_moves`` the new one stays close to it.

    Raises:
        InputError: the settings or the running plan do not fit the trace, or the problem has no solution.
    """
    cluster = resolve_cluster(settings.cluster, settings.model_size, trace.expert_bytes)
    if running is not None:
        running.check_model(trace.num_experts, trace.top_k, trace.layer_ids, trace.model_fingerprint)
    progress("counting")
    problem = build_problem(
        *(trace, trace.split_mask(SOLVE_SPLIT), cluster, settings.slots_per_gpu, settings.memory, settings.objective),
        *(settings.workload, settings.dispatch, running, settings.max_moves),
    )
    routes = held_out_experts(trace, JUDGE_SPLIT)
    solution = solve(settings.strategy, problem, settings.solver, progress)
    if running is not None and settings.max_moves is None:
        solution = _align_to_running(solution, running, problem)
    plan = PlacementPlan(
        model=portable_model(settings.model or trace.model, output),
        model_fingerprint=trace.model_fingerprint,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        layer_ids=trace.layer_ids,
        cluster=cluster.to_dict(),
        workload=settings.workload,
        slots=solution.slots,
        dispatch=settings.dispatch,
        strategy=settings.strategy,
        objective=settings.objective.to_dict(),
        solver=solver_section(solution, settings.solver.seed),
        trace={"sha256": trace.sha256(), "tokens": trace.num_tokens},
    )
    compared = {"plan": plan.slots} | ({} if running is None else {"running": running.slots})
    anew = replace(problem, max_moves=None)
    compared |= {name: solve(name, anew, settings.solver).slots for name in ("contiguous", "eplb")}
    judged = {}
    for name, slots in compared.items():
        progress(f"judging {name} on held-out tokens")
        sizes, judge = settings.workload.batch_sizes, settings.judge
        judged[name] = evaluate_routes(replace(plan, slots=slots), routes, cluster, sizes, judge.batches, judge.seed)
    documents = {name: metrics.to_dict() for name, metrics in judged.items()}
    predicted = {metric: {name: documents[name][metric] for name in documents} for metric in documents["plan"]}
    moves: list[Move] = []
    if running is not None:
        moves = plan_moves(running.slots, plan.slots, cluster.gpus_per_node)
        plan = replace(plan, migration=moves_document(moves, trace.expert_bytes))
    return SolvedTrace(replace(plan, predicted=predicted), solution, judged, moves)


def _align_to_running(solution: Solution, running: PlacementPlan, problem: PlacementProblem) -> Solution:
    """The same placement with GPUs renamed so that few copies move; layers apart where nothing ties them.

    Step times may change a little, as the dispatch rule breaks ties by GPU: value and gap are those after renaming.
    """
    tied = problem.objective.name == "locality" or problem.workload.exchange == "coherent"
    slots = align_to(running.slots, solution.slots, problem.gpus_per_node, per_layer=not tied)
    before, after = (num_moves(running.slots, placed) for placed in (solution.slots, slots))
    notes = [*solution.notes, f"GPUs were renamed: {after} copies move from the running plan instead of {before}"]
    renamed = Solution.of(problem, slots, solution.name, time.perf_counter(), solution.bound, notes)
    return replace(renamed, seconds=solution.seconds)


def solve_counts(
    counts: RoutingCounts,
    settings: SolveSettings,
    output: Path,
    progress: Progress,
    running: PlacementPlan | None = None,
) -> tuple[PlacementPlan, Solution]:
    """Solve on counts alone, which know popularity but no affinity; the loads are those of the same counts.

    Args:
        counts, settings, output, progress: as for ``solve_trace``; ``settings.top_k`` is needed, as counts lack it.
        running: not supported with counts.

    Raises:
        InputError: the objective or strategy needs more than counts, or the settings do not fit.
    """
    if settings.top_k is None:
        raise ProblemError(
            "counts do not tell how many experts a token chooses: give top_k=, as the model's config has it"
        )
    if running is not None or settings.objective.name != "balance":
        what = "--running" if running is not None else f"objective {settings.objective.name}"
        raise ProblemError(
            f"{what} needs every token's routes, {counts.model!r} has counts alone: give objective=balance, or trace it"
        )
    if settings.objective.pairs != "all" or settings.max_moves is not None:
        what = "objective.pairs=top1" if settings.max_moves is None else f"max_moves={settings.max_moves}"
        raise ProblemError(f"{what}: counts tell neither first choices nor a running plan; remove it, or give a trace")
    num_layers, num_experts = counts.counts.shape
    cluster = resolve_cluster(settings.cluster, settings.model_size, None)
    unknown = np.zeros((0, num_experts, num_experts), dtype=np.int64)
    statistics = RoutingStatistics(0, counts.counts, np.zeros_like(counts.counts), unknown, unknown, unknown)
    memory, asked = settings.memory, settings.slots_per_gpu
    given = asked == "fill" or memory.gpu_bytes is not None
    expert_bytes = cluster.coefficients[0].expert_bytes if given else None
    budget = slot_budget(cluster, num_experts, num_layers, asked, expert_bytes, memory)
    problem = PlacementProblem(statistics, budget, settings.objective, cluster=cluster)
    solution = solve(settings.strategy, problem, settings.solver, progress)
    loads = layer_loads(solution.slots, counts.counts)
    plan = PlacementPlan(
        model=portable_model(settings.model or counts.model, output),
        num_experts=num_experts,
        top_k=settings.top_k,
        layer_ids=counts.layer_ids,
        cluster=cluster.to_dict(),
        workload=settings.workload,
        slots=solution.slots,
        dispatch=settings.dispatch,
        strategy=settings.strategy,
        objective=settings.objective.to_dict(),
        predicted={"load_mean": {"plan": float(loads.mean())}, "load_max": {"plan": float(loads.max())}},
        solver=solver_section(solution, settings.solver.seed),
    )
    return plan, solution


def build_problem(
    trace: RoutingTrace,
    mask_T: NDArray[np.bool_],
    cluster: Cluster,
    slots_per_gpu: SlotRequest,
    memory: MemoryBudget,
    objective: Objective,
    workload: Workload,
    dispatch: Dispatch,
    running: PlacementPlan | None = None,
    max_moves: int | None = None,
) -> PlacementProblem:
    """The placement problem of some of a trace's tokens.

    Args:
        trace: what was routed.
        mask_T: bool [T], the tokens to solve on.
        cluster: with its coefficients.
        slots_per_gpu, memory: the budget, see ``placement.memory``; checked with the cluster's assumed size of an
            expert where the trace does not tell it and memory is asked for.
        objective, workload, dispatch: what to optimise.
        running, max_moves: a plan to start from, and how far to go from it.

    Raises:
        InputError: no token is selected, or the budget does not fit.
    """
    expert_bytes = trace.expert_bytes
    if expert_bytes is None and (slots_per_gpu == "fill" or memory.gpu_bytes is not None):
        expert_bytes = cluster.coefficients[0].expert_bytes  # assumed: memory was asked to be kept to
    budget = slot_budget(cluster, trace.num_experts, trace.num_layers, slots_per_gpu, expert_bytes, memory)
    parts = [chunk.experts[mask_T[chunk.start : chunk.start + chunk.num_tokens]] for chunk in trace.chunks()]
    return PlacementProblem(
        collect_statistics(trace, mask_T),
        budget,
        objective,
        cluster=cluster,
        routes=np.concatenate(parts),
        sequences=trace.sequence()[mask_T],
        workload=workload,
        dispatch=dispatch,
        running=None if running is None else running.slots,
        max_moves=max_moves,
    )


def plan_for(path: Path, trace: RoutingTrace, cluster: Cluster, workload: Workload) -> PlacementPlan:
    """A plan file with another workload, to be judged on a trace and a cluster.

    Raises:
        InputError: the plan cannot be read, or does not fit the trace or the cluster.
    """
    plan = PlacementPlan.load(path)
    plan.check_model(trace.num_experts, trace.top_k, trace.layer_ids, trace.model_fingerprint)
    if plan.num_gpus != cluster.num_gpus:
        raise ProblemError(
            f"plan {path} is for {plan.num_gpus} GPUs, cluster {cluster.name} has {cluster.num_gpus}: "
            "name a cluster of as many GPUs"
        )
    return replace(plan, workload=workload)


def portable_model(model: str, output: Path) -> str:
    """A hub id as it is, a local path relative to the plan file."""
    if not Path(model).exists():
        return model
    return os.path.relpath(Path(model).resolve(), output.resolve().parent)


def solver_section(solution: Solution, seed: int | None) -> dict[str, Any]:
    """How a solution was found, as the plan stores it."""
    return {
        "name": solution.name,
        "seconds": round(solution.seconds, 3),
        "value": solution.value,
        "bound": solution.bound,
        "gap": solution.gap,
        "optimal": solution.optimal,
        "seed": seed,
        "notes": list(solution.notes),
    }
