"""Every strategy at one budget of slots, judged on tokens that none of them has seen.

Shape suffixes: T tokens, L layers, K choices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes
from placement.held_out import HeldOutSplit, splits
from placement.memory import slot_budget
from placement.metrics import Metrics
from placement.plan import PlacementPlan
from placement.problem import Objective, Progress, Solution
from placement.settings import FOLLOWS_OBJECTIVE, CompareSettings, resolve_cluster
from placement.slots import Slots
from placement.strategies import solve
from placement.uncertainty import BatchUncertainty, uncertainty_of
from placement.workflow import build_problem, plan_for, solver_section
from profiler.trace_format import RoutingTrace

#: Why a strategy has no row.
LEFT_OUT = "left out, on one node it is eplb"


@dataclass(frozen=True)
class ComparedPlan:
    """One plan of a comparison; without ``plan`` and ``metrics`` where the strategy found none: ``problem`` says why.

    Attributes:
        name: of the row of ``conf/compare.yaml``, or the plan's file.
        split: what it was solved on (but for a plan file) and judged on.
        is_file: whether it was made before, and has no solution.
        plan, solution: as found.
        objective: that it was solved for; None for plan files and for strategies with a goal of their own.
        metrics: of the replay.
        uncertainty: by batch size.
        problem: why there is no plan, in one line.
        notes: what a plan file is to be read with, one line each.
    """

    name: str
    split: HeldOutSplit
    is_file: bool = False
    plan: PlacementPlan | None = None
    objective: Objective | None = None
    solution: Solution | None = None
    metrics: Metrics | None = None
    uncertainty: Mapping[int, BatchUncertainty] = field(default_factory=dict)
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines worth printing: why there is no plan, or what the strategy has to say of it."""
        if self.problem is not None:
            return (self.problem,)
        return self.notes if self.solution is None else self.solution.notes

    @property
    def slots_used(self) -> int:
        """Filled slots in all layers; 0 without a plan."""
        return 0 if self.plan is None else sum(len(held) for layer in self.plan.slots for held in layer)

    @property
    def copies(self) -> int:
        """Copies of experts beyond the first of each, in all layers."""
        return 0 if self.plan is None else self.slots_used - self.plan.num_layers * self.plan.num_experts

    def to_rows(self) -> list[dict[str, Any]]:
        """Flat rows for a file of results: one per batch size, or one without figures where there is no plan."""
        found = None if self.solution is None else solver_section(self.solution, None)
        of_objective = ("value", "bound", "gap", "optimal")
        row: dict[str, Any] = {
            "held_out": self.split.held_out,
            "solved_on": None if self.is_file else self.split.solved_on,
            "solved_tokens": None if self.is_file else int(self.split.solve_T.sum()),
            "judged_on": self.split.judged_on,
            "judged_tokens": int(self.split.judge_T.sum()),
            "plan": self.name,
            "problem": self.problem,
            "remark": "; ".join(self.notes) or None,
            "objective": None if self.objective is None else self.objective.name,
        }
        row |= {f"solver_{key}": None if found is None else found[key] for key in ("name", "seconds")}
        told = None if self.objective is None else found
        row |= {f"solver_{key}": None if told is None else told[key] for key in of_objective}
        row["solver_notes"] = None if self.solution is None else "; ".join(self.solution.notes)
        if self.plan is None or self.metrics is None:
            return [row | {"batch": None}]
        row |= {
            "dispatch_rule": self.plan.dispatch.rule,
            "split_above_tokens": self.plan.dispatch.split_above_tokens,
        }
        row |= {"slots_used": self.slots_used, "copies": self.copies}
        row |= {"load_mean": self.metrics.load_mean, "load_max": self.metrics.load_max}
        return [
            row
            | {"batch": size, "repeats": len(self.metrics.samples[size].step_us)}
            | asdict(figures)
            | self.uncertainty[size].to_dict()
            for size, figures in self.metrics.by_batch_size.items()
        ]


def compare_strategies(
    trace: RoutingTrace, settings: CompareSettings, others: Sequence[Path], progress: Progress
) -> tuple[Cluster, list[ComparedPlan]]:
    """Judge every strategy, and plans made before, on held-out tokens.

    Args:
        trace: what was routed. Held-out domains are left out where it names fewer than two.
        settings: of ``compare``.
        others: plan files to judge as well; they keep their own dispatch rule. Those that were solved on this trace
            have seen sequences of all its domains, and are not judged on held-out domains.
        progress: called with one line now and then.

    Returns:
        The cluster with its coefficients, and one entry per kind of held-out tokens, strategy and plan, in this order.

    Raises:
        InputError: the settings or a plan do not fit the trace, or no plan results.
    """
    cluster = resolve_cluster(settings.cluster, settings.model_size, trace.expert_bytes)
    strategies = settings.rows()
    if not strategies and not others:
        raise ProblemError(f"strategies {list(settings.left_out)}: {LEFT_OUT}; name others, or a plan")
    most = trace.num_layers * sum(_budget(trace, cluster, settings))
    taken = [row.name for row in strategies] + [path.name for path in others]
    plans = [
        (
            path.name if taken.count(path.name) == 1 else str(path),
            plan_for(path, trace, cluster, settings.workload),
        )
        for path in dict.fromkeys(others)
    ]
    compared = []
    for split in splits(trace, settings.held_out):
        rows = _solve_all(trace, cluster, settings, split, progress)
        rows += [_given_plan(name, plan, split, trace, most) for name, plan in plans]
        experts_TLK = trace.experts()[split.judge_T]
        sequence_T = trace.sequence()[split.judge_T]
        sizes, judge = settings.workload.batch_sizes, settings.judge
        for index, row in enumerate(rows):
            if row.plan is not None:
                progress(f"{row.name}: judging on {split.judged_on}")
                metrics = evaluate_routes(row.plan, experts_TLK, cluster, sizes, judge.batches, judge.seed, sequence_T)
                rows[index] = replace(row, metrics=metrics)
        progress("resampling")
        found = uncertainty_of({row.name: row.metrics for row in rows if row.metrics is not None}, judge)
        compared += [replace(row, uncertainty=found.get(row.name, {})) for row in rows]
    if all(row.plan is None for row in compared):
        raise ProblemError(f"no plan results; {compared[0].name}: {compared[0].problem}")
    return cluster, compared


def comparison_facts(trace: RoutingTrace, cluster: Cluster, settings: CompareSettings) -> dict[str, Any]:
    """What all rows of a comparison share: model, cluster and how plans were judged."""
    return {
        "model": os.path.basename(trace.model),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "trace_sha256": trace.sha256(),
        "trace_tokens": trace.num_tokens,
        "cluster": cluster.name,
        "gpus": cluster.num_gpus,
        "slots": trace.num_layers * sum(_budget(trace, cluster, settings)),
        "exchange": settings.workload.exchange,
        "pairs": settings.pairs,
        "dispatch_rule": settings.dispatch.rule,
        "split_above_tokens": settings.dispatch.split_above_tokens,
        "resamples": settings.judge.resamples,
        "seed": settings.judge.seed,
    } | cost_facts(cluster)


def cost_facts(cluster: Cluster) -> dict[str, Any]:
    """The sizes and coefficients that step times are predicted with, by flat names.

    Args:
        cluster: with its coefficients, of which the first are used.
    """
    used = cluster.coefficients[0]
    terms = {"c0_us": used.c0_us, "c1_us": used.c1_us, "c2_us": used.c2_us}
    sources = sorted({term.source for term in terms.values()}, reverse=True)
    return {
        "expert_bytes": used.expert_bytes,
        "hidden_state_bytes": used.hidden_state_bytes,
        **{name: term.value for name, term in terms.items()},
        "coefficients_source": " and ".join(sources),
    }


def _budget(trace: RoutingTrace, cluster: Cluster, settings: CompareSettings) -> tuple[int, ...]:
    """Slots of each GPU and layer; as in ``build_problem`` with an assumed size of an expert where memory needs it."""
    expert_bytes = trace.expert_bytes
    if expert_bytes is None and (settings.slots_per_gpu == "fill" or settings.memory.gpu_bytes is not None):
        expert_bytes = cluster.coefficients[0].expert_bytes
    return slot_budget(
        *(cluster, trace.num_experts, trace.num_layers, settings.slots_per_gpu, expert_bytes, settings.memory)
    )


def _solve_all(
    trace: RoutingTrace, cluster: Cluster, settings: CompareSettings, split: HeldOutSplit, progress: Progress
) -> list[ComparedPlan]:
    """One entry per strategy: its plan, or why there is none."""
    free = Objective("locality", settings.pairs)
    problem = build_problem(
        *(trace, split.solve_T, cluster, settings.slots_per_gpu, settings.memory),
        *(free, settings.workload, settings.dispatch),
    )
    rows = []
    for row in settings.rows():
        progress(f"{row.name}: solving on {split.solved_on}")
        objective = row.objective if row.strategy in FOLLOWS_OBJECTIVE else None
        try:
            chosen = replace(problem, objective=row.objective)
            solution = solve(row.strategy, chosen, settings.solver, partial(_tell, progress, row.name))
        except ProblemError as error:
            rows.append(ComparedPlan(row.name, split, objective=objective, problem=str(error)))
            continue
        plan = _bare_plan(trace, settings, solution.slots)
        rows.append(ComparedPlan(row.name, split, plan=plan, objective=objective, solution=solution))
    return rows


def _given_plan(
    name: str, plan: PlacementPlan, split: HeldOutSplit, trace: RoutingTrace, most_slots: int
) -> ComparedPlan:
    """A plan file's row: what it is to be read with, or why it is not judged."""
    origin = plan.trace.get("sha256")
    if split.held_out == "domains" and origin == trace.sha256():
        problem = "solved on this trace: nothing of these domains is held out from it"
        return ComparedPlan(name, split, is_file=True, problem=problem)
    row = ComparedPlan(name, split, is_file=True, plan=plan)
    notes = [] if origin else ["origin unknown: it may have been made from these tokens"]
    if row.slots_used > most_slots:
        notes.append(f"holds {row.slots_used} slots in all, the others have {most_slots}")
    return replace(row, notes=tuple(notes))


def _tell(progress: Progress, name: str, line: str) -> None:
    progress(f"{name}: {line}")


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
