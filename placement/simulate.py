"""Simulation: a trace replayed on a cluster that is not there, for each of several strategies.

What is assumed:

* A step's tokens are routed as the trace's tokens were: they are drawn independently from its held-out sequences, B
  over the whole cluster. Nothing is said about queues, so B is given, not found.
* Every GPU runs its experts of a layer at the speed of the cluster's figures (``placement.cost``): its time is linear
  in active experts and pairs, and the slowest GPU ends the layer. Computation and exchanges do not overlap, and layers
  follow each other. Attention, shared experts and everything else that no placement changes is left out.
* Links are as the cluster describes them: one port per GPU, link class and direction, at full bandwidth whatever the
  size of a message; the busiest port ends an exchange. The network between nodes is not oversubscribed, and a hidden
  state goes once to every GPU that needs it, also to several of one node.
* ``allreduce`` is a ring over all GPUs (``placement.cost.allreduce_bytes``).
* Memory is that of the routed experts' slots alone, in all MoE layers.

A cluster with more GPUs than the model has experts needs copies for its GPUs: then ``slots_per_gpu`` must be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes, held_out_experts
from placement.memory import SlotRequest, slot_budget
from placement.metrics import Metrics
from placement.plan import Dispatch, PlacementPlan, Workload
from placement.problem import Objective, PlacementProblem, Progress, SolverSettings
from placement.settings import (
    Judge,
    ModelSize,
    batch_sizes,
    build_settings,
    judge_settings,
    resolve_cluster,
    settings_group,
    workload_settings,
)
from placement.slots import Slots
from placement.strategies import STRATEGIES, solve
from placement.workflow import JUDGE_SPLIT, SOLVE_SPLIT, plan_for
from profiler.statistics import collect_statistics
from profiler.trace_format import RoutingTrace


@dataclass(frozen=True)
class SimulateSettings:
    """Settings of ``simulate``; ``workload`` holds the batch sizes and the exchange to simulate."""

    cluster: Cluster
    workload: Workload
    model_size: ModelSize
    strategies: tuple[str, ...]
    slots_per_gpu: SlotRequest
    dispatch: Dispatch
    judge: Judge
    solver: SolverSettings


@dataclass(frozen=True)
class SimulatedPlan:
    """One strategy's (or plan file's) replay.

    Attributes:
        name: of the strategy, or the plan's file.
        plan: None where the strategy found none, ``problem`` then says why.
        seconds: that the strategy took, or None for a plan made before.
        metrics: of the replay.
    """

    name: str
    plan: PlacementPlan | None
    seconds: float | None
    metrics: Metrics | None = None
    problem: str | None = None

    def to_rows(self, expert_bytes: int) -> list[dict[str, Any]]:
        """Flat rows for a file of results: one per batch size, or one without figures where there is no plan."""
        row: dict[str, Any] = {"plan": self.name, "problem": self.problem, "solver_seconds": self.seconds}
        if self.plan is None or self.metrics is None:
            return [row | {"batch": None}]
        memory = memory_bytes(self.plan.slots, expert_bytes)
        row |= {"memory_bytes_mean": sum(memory) / len(memory), "memory_bytes_max": max(memory)}
        row |= {"load_mean": self.metrics.load_mean, "load_max": self.metrics.load_max}
        return [row | {"batch": size} | asdict(figures) for size, figures in self.metrics.by_batch_size.items()]


def simulate_settings(config: Mapping[str, Any]) -> SimulateSettings:
    """Settings of ``simulate`` from ``conf/simulate.yaml``.

    Raises:
        InputError: a value has the wrong type or is out of range, or a strategy is unknown.
    """
    workload, model_size = workload_settings(config["workload"])
    strategies = config["strategies"]
    if not isinstance(strategies, list) or any(not isinstance(n, str) or n not in STRATEGIES for n in strategies):
        raise ProblemError(f"strategies {strategies!r}: expected a list of some of {sorted(STRATEGIES)}")
    return SimulateSettings(
        cluster=Cluster.from_dict(settings_group(config, "cluster")),
        workload=Workload(workload.phase, batch_sizes(config), config["exchange"]),
        model_size=model_size,
        strategies=tuple(dict.fromkeys(strategies)),
        slots_per_gpu=config["slots_per_gpu"],
        dispatch=build_settings(Dispatch, config["dispatch"], "dispatch"),
        judge=judge_settings(config),
        solver=build_settings(SolverSettings, config["solver"], "solver"),
    )


def simulate(
    trace: RoutingTrace, settings: SimulateSettings, others: Sequence[Path], progress: Progress
) -> tuple[Cluster, list[SimulatedPlan]]:
    """Solve with every strategy on the even sequences of a trace, replay its odd ones.

    Args:
        trace: what was routed.
        settings: of ``simulate``.
        others: plan files to replay as well, with their own dispatch rule and the simulated exchange.
        progress: called with one line now and then.

    Returns:
        The cluster with its coefficients, and one entry per strategy and plan.

    Raises:
        InputError: the settings or a plan do not fit the trace or the cluster, or no plan results.
    """
    if not settings.strategies and not others:
        raise ProblemError("strategies [] and no plan: name a strategy, for example strategies=[eplb], or a plan")
    cluster = resolve_cluster(settings.cluster, settings.model_size, trace.expert_bytes)
    rows = [
        SimulatedPlan(str(path), plan_for(path, trace, cluster, settings.workload), seconds=None) for path in others
    ]
    if settings.strategies:
        rows = _solve_all(trace, cluster, settings, progress) + rows
    if all(row.plan is None for row in rows):
        raise ProblemError(f"no plan results; {rows[0].name}: {rows[0].problem}")
    routes = held_out_experts(trace, JUDGE_SPLIT)
    sizes, judge = settings.workload.batch_sizes, settings.judge
    for index, row in enumerate(rows):
        if row.plan is not None:
            progress(f"{row.name}: replaying")
            metrics = evaluate_routes(row.plan, routes, cluster, sizes, judge.batches, judge.seed)
            rows[index] = replace(row, metrics=metrics)
    return cluster, rows


def memory_bytes(slots: Slots, expert_bytes: int) -> tuple[int, ...]:
    """Bytes of the experts that each GPU holds, over all layers."""
    return tuple(expert_bytes * sum(map(len, layers)) for layers in zip(*slots, strict=True))


def _solve_all(
    trace: RoutingTrace, cluster: Cluster, settings: SimulateSettings, progress: Progress
) -> list[SimulatedPlan]:
    """One plan per strategy, or why there is none; ``step_time`` optimises what its name says."""
    problem = _simulated_problem(trace, cluster, settings)
    rows = []
    for name in settings.strategies:
        progress(f"{name}: solving")
        objective = Objective("step_time" if name == "step_time" else "locality")
        try:
            solution = solve(name, replace(problem, objective=objective), settings.solver, progress)
        except ProblemError as error:
            rows.append(SimulatedPlan(name, None, None, problem=str(error)))
            continue
        plan = PlacementPlan(
            model=trace.model,
            num_experts=trace.num_experts,
            top_k=trace.top_k,
            layer_ids=trace.layer_ids,
            slots=solution.slots,
            workload=settings.workload,
            dispatch=settings.dispatch,
        )
        rows.append(SimulatedPlan(name, plan, round(solution.seconds, 3)))
    return rows


def _simulated_problem(trace: RoutingTrace, cluster: Cluster, settings: SimulateSettings) -> PlacementProblem:
    """The placement problem of a trace's even sequences; memory is checked with the assumed size of an expert, too."""
    if settings.slots_per_gpu is None and trace.num_experts < cluster.num_gpus:
        raise ProblemError(
            f"cluster {cluster.name} has {cluster.num_gpus} GPUs for {trace.num_experts} experts: give slots_per_gpu=1 "
            "or more, so that GPUs hold copies, or simulate a smaller cluster"
        )
    expert_bytes = cluster.coefficients[0].expert_bytes
    return PlacementProblem(
        collect_statistics(trace, trace.split_mask(SOLVE_SPLIT)),
        slot_budget(cluster, trace.num_experts, trace.num_layers, settings.slots_per_gpu, expert_bytes),
        Objective("step_time"),
        cluster=cluster,
        routes=held_out_experts(trace, SOLVE_SPLIT),
        sequences=trace.sequence()[trace.split_mask(SOLVE_SPLIT)],
        workload=settings.workload,
        dispatch=settings.dispatch,
    )
