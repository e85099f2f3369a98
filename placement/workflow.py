"""From a trace and settings to a judged plan: what the command line does, without the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes, held_out_experts
from placement.metrics import Metrics
from placement.plan import PlacementPlan
from placement.problem import Objective, PlacementProblem, Solution, slot_budget
from placement.settings import CompareSettings, SolveSettings, resolve_cluster
from placement.slots import Slots
from placement.strategies import solve
from placement.strategies.ilp import Progress
from profiler.statistics import collect_statistics
from profiler.trace_format import RoutingTrace, Split

SOLVE_SPLIT: Split = "even"
JUDGE_SPLIT: Split = "odd"


@dataclass(frozen=True)
class ComparedPlan:
    """One row of a comparison; ``metrics`` is None where the strategy found no plan, ``problem`` then says why."""

    name: str
    plan: PlacementPlan | None
    solution: Solution | None
    metrics: Metrics | None
    problem: str | None = None

    def to_rows(self) -> list[dict[str, Any]]:
        """Flat rows for a file of results: one per batch size, or one without figures where there is no plan."""
        found = None if self.solution is None else _solver_section(self.solution, None)
        solver = ("name", "seconds", "value", "bound", "gap", "optimal")
        row: dict[str, Any] = {"plan": self.name, "problem": self.problem}
        row |= {f"solver_{key}": None if found is None else found[key] for key in solver}
        if self.metrics is None:
            return [row | {"batch": None}]
        row |= {"load_mean": self.metrics.load_mean, "load_max": self.metrics.load_max}
        return [row | {"batch": size} | asdict(figures) for size, figures in self.metrics.by_batch_size.items()]


def solve_trace(
    trace: RoutingTrace, settings: SolveSettings, output: Path, progress: Progress
) -> tuple[PlacementPlan, Solution, dict[str, Metrics]]:
    """Solve on the even sequences of a trace, judge on its odd ones.

    Args:
        trace: what was routed.
        settings: of ``solve``.
        output: where the plan will be written; the model's path is stored relative to it.
        progress: called with one line now and then.

    Returns:
        The plan with its predictions, the solution, and metrics of ``plan``, ``contiguous`` and ``eplb``.

    Raises:
        InputError: the settings do not fit the trace, or the problem has no solution.
    """
    cluster = resolve_cluster(settings.cluster, settings.model_size, trace.expert_bytes)
    progress("counting")
    problem = _problem(trace, cluster, settings.slots_per_gpu, settings.objective)
    routes = held_out_experts(trace, JUDGE_SPLIT)
    solution = solve(settings.strategy, problem, settings.solver, progress)
    plan = PlacementPlan(
        model=_portable_model(settings.model or trace.model, output),
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
        solver=_solver_section(solution, settings.solver.seed),
        trace={"sha256": trace.sha256(), "tokens": trace.num_tokens},
    )
    judged = {}
    for name in ("plan", "contiguous", "eplb"):
        progress(f"judging {name} on held-out tokens")
        slots = plan.slots if name == "plan" else solve(name, problem, settings.solver).slots
        sizes, judge = settings.workload.batch_sizes, settings.judge
        judged[name] = evaluate_routes(replace(plan, slots=slots), routes, cluster, sizes, judge.batches, judge.seed)
    documents = {name: metrics.to_dict() for name, metrics in judged.items()}
    predicted = {metric: {name: documents[name][metric] for name in documents} for metric in documents["plan"]}
    return replace(plan, predicted=predicted), solution, judged


def compare_strategies(
    trace: RoutingTrace, settings: CompareSettings, others: Sequence[Path], progress: Progress
) -> tuple[Cluster, list[ComparedPlan]]:
    """Judge every strategy, and plans made before, on the odd sequences of a trace.

    Args:
        trace: what was routed.
        settings: of ``compare``.
        others: plan files to judge as well; they keep their own dispatch rule.
        progress: called with one line now and then.

    Returns:
        The cluster with its coefficients, and one row per strategy and plan.

    Raises:
        InputError: the settings or a plan do not fit the trace.
    """
    cluster = resolve_cluster(settings.cluster, settings.model_size, trace.expert_bytes)
    pairs = settings.pairs
    free = Objective("locality", pairs)
    bounded = Objective("locality", pairs, settings.max_load)
    runs = [
        ("contiguous", "contiguous", free),
        ("eplb", "eplb", free),
        ("locality", "ilp", free),
        (f"locality ≤{settings.max_load:g}", "ilp", bounded),
        ("balance", "ilp", Objective("balance", pairs)),
    ]
    taken = [name for name, _, _ in runs] + [path.name for path in others]
    plans = [
        (path.name if taken.count(path.name) == 1 else str(path), _compatible_plan(path, trace, cluster, settings))
        for path in dict.fromkeys(others)
    ]
    routes = held_out_experts(trace, JUDGE_SPLIT)
    problem = _problem(trace, cluster, settings.slots_per_gpu, free)
    rows = []
    for name, strategy, objective in runs:
        progress(f"{name}: solving")
        try:
            solution = solve(strategy, replace(problem, objective=objective), settings.solver, progress)
        except ProblemError as error:
            rows.append(ComparedPlan(name, None, None, None, str(error)))
            continue
        rows.append(ComparedPlan(name, _bare_plan(trace, settings, solution.slots), solution, None))
    rows += [ComparedPlan(name, plan, None, None) for name, plan in plans]
    sizes, judge = settings.workload.batch_sizes, settings.judge
    for index, row in enumerate(rows):
        if row.plan is not None:
            progress(f"{row.name}: judging on held-out tokens")
            metrics = evaluate_routes(row.plan, routes, cluster, sizes, judge.batches, judge.seed)
            rows[index] = replace(row, metrics=metrics)
    return cluster, rows


def comparison_facts(trace: RoutingTrace, cluster: Cluster, settings: CompareSettings) -> dict[str, Any]:
    """What all rows of a comparison share: model, cluster and how plans were judged."""
    return {
        "model": os.path.basename(trace.model),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "trace_sha256": trace.sha256(),
        "trace_tokens": trace.num_tokens,
        "judged_tokens": int(trace.split_mask(JUDGE_SPLIT).sum()),
        "cluster": cluster.name,
        "gpus": cluster.num_gpus,
        "exchange": settings.workload.exchange,
        "pairs": settings.pairs,
        "split_above_tokens": settings.dispatch.split_above_tokens,
        "repeats": settings.judge.batches,
        "seed": settings.judge.seed,
    }


def _bare_plan(trace: RoutingTrace, settings: CompareSettings, slots: Slots) -> PlacementPlan:
    """A plan with what a replay needs."""
    return PlacementPlan(
        model=trace.model,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        layer_ids=trace.layer_ids,
        slots=slots,
        workload=settings.workload,
        dispatch=settings.dispatch,
    )


def _problem(
    trace: RoutingTrace, cluster: Cluster, slots_per_gpu: int | Sequence[int] | None, objective: Objective
) -> PlacementProblem:
    """The placement problem of a trace's solve split."""
    budget = slot_budget(cluster, trace.num_experts, trace.num_layers, slots_per_gpu, trace.expert_bytes)
    return PlacementProblem(collect_statistics(trace, trace.split_mask(SOLVE_SPLIT)), budget, objective)


def _compatible_plan(path: Path, trace: RoutingTrace, cluster: Cluster, settings: CompareSettings) -> PlacementPlan:
    """A plan file with the comparison's exchange, refused where it fits neither trace nor cluster."""
    plan = PlacementPlan.load(path)
    plan.check_model(trace.num_experts, trace.top_k, trace.layer_ids, trace.model_fingerprint)
    if plan.num_gpus != cluster.num_gpus:
        raise ProblemError(f"plan {path} is for {plan.num_gpus} GPUs, cluster {cluster.name} has {cluster.num_gpus}")
    return replace(plan, workload=settings.workload)


def _portable_model(model: str, output: Path) -> str:
    """A hub id as it is, a local path relative to the plan file."""
    if not Path(model).exists():
        return model
    return os.path.relpath(Path(model).resolve(), output.resolve().parent)


def _solver_section(solution: Solution, seed: int | None) -> dict[str, Any]:
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
