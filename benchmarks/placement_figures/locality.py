"""Locality on the public trace: solved on even sequences, judged on odd ones."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.placement_figures.common import (
    PublicTrace,
    Row,
    Say,
    bounded,
    cluster_of,
    describe,
    extra_slots,
    public_trace,
    reach,
    solve_row,
)
from placement.errors import ProblemError
from placement.metrics import Metrics, layer_loads
from placement.plan import Workload
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import Slots

SETTINGS = SolverSettings(time_limit_s=60.0, search_rounds=1200)
BASELINE_SETTINGS = SolverSettings(time_limit_s=30.0)
#: Choices that count, GPUs, load bound, locality to reach.
CASES = (
    ("all", 4, None, 0.56),
    ("all", 4, 1.15, 0.485),
    ("all", 8, None, 0.375),
    ("all", 8, 1.30, 0.31),
    ("top1", 4, None, 0.72),
    ("top1", 4, 1.15, 0.66),
)
#: Copies are chosen per step: tokens per step at which placements with copies are judged.
BATCH_SIZES = (1, 8, 32)
MAIN_BATCH = 8
EXTRA_PERCENT = 25
BASELINES = ("contiguous", "random", "eplb", "lina", "exflow", "moetuner")
#: Load bounds of the curve of locality against balance, by number of GPUs.
CURVE = {4: (1.05, 1.10, 1.15, 1.30, 1.50, None), 8: (1.05, 1.10, 1.15, 1.30, 1.50, 2.0, None)}
EXCHANGE = "coherent"


def measure(say: Say) -> list[Row]:
    """All rows of the group."""
    trace = public_trace()
    rows: list[Row] = []
    for pairs, num_gpus, max_load, target in CASES:
        objective = Objective("locality", pairs, max_load)  # type: ignore[arg-type]
        one_copy = _one_copy(trace, num_gpus, objective, target, say)
        rows += one_copy
        unseen = next(row["value"] for row in one_copy if row["tokens"] == "unseen" and row["metric"] == "locality")
        rows += _with_copies(trace, num_gpus, objective, unseen, say)
    for num_gpus in CURVE:
        rows += _compared(trace, num_gpus, say)
    return rows


def _one_copy(trace: PublicTrace, num_gpus: int, objective: Objective, target: float, say: Say) -> list[Row]:
    problem = _problem(trace, num_gpus, 0, objective)
    name = case_name(objective, num_gpus)
    say(name)
    solution, facts = solve_row("ilp", problem, SETTINGS, say)
    metrics = trace.judge(solution.slots, trace.half(1), problem, (MAIN_BATCH,))
    facts |= {"plan": "one copy"}
    rows = [
        facts
        | {"figure": f"{name}, unseen", "metric": "locality", "tokens": "unseen", "batch": None}
        | reach(_locality(metrics, MAIN_BATCH, objective), "≥", target),
        facts
        | {"figure": f"{name}, solved", "metric": "locality", "tokens": "solved", "batch": None}
        | bounded(solution),
    ]
    rows += _load_rows(name, facts, problem, solution.slots)
    if objective.max_load is None:
        rows.append(_solved_on_unseen(trace, num_gpus, objective, say))
    return rows


def _solved_on_unseen(trace: PublicTrace, num_gpus: int, objective: Objective, say: Say) -> Row:
    """What the same search reaches on the unseen half where it may see it: how much is left to reach there at all."""
    workload = Workload(batch_sizes=BATCH_SIZES, exchange=EXCHANGE)  # type: ignore[arg-type]
    problem = trace.problem(trace.half(1), cluster_of(num_gpus), None, objective, workload)
    solution, facts = solve_row("ilp", problem, SETTINGS, say)
    figure = f"{case_name(objective, num_gpus)}, solved on the unseen half itself"
    row = facts | {"plan": "one copy", "figure": figure, "metric": "locality_seen", "tokens": "solved", "batch": None}
    return row | bounded(solution)


def _with_copies(trace: PublicTrace, num_gpus: int, objective: Objective, one_copy: float, say: Say) -> list[Row]:
    """Spare slots under rule ``level``; then under ``nearest``, judged under it and under ``level``."""
    rows = []
    for solved_for, judged_by in (("level", ("level",)), ("nearest", ("nearest", "level"))):
        problem = _problem(trace, num_gpus, EXTRA_PERCENT, objective, solved_for)
        name = f"{case_name(objective, num_gpus)}, +{EXTRA_PERCENT}% for {solved_for}"
        say(name)
        solution, facts = solve_row("ilp", problem, SETTINGS, say)
        facts |= {"plan": f"copies for {solved_for}"}
        copies = sum(len(held) for layer in solution.slots for held in layer) - problem.num_layers * problem.num_experts
        facts |= {"copies": copies}
        for rule in judged_by:
            for tokens, half in (("unseen", 1), ("solved", 0)):
                metrics = trace.judge(solution.slots, trace.half(half), problem, BATCH_SIZES, rule)
                for batch in BATCH_SIZES:
                    value = _locality(metrics, batch, objective)
                    row = facts | {"metric": "locality", "tokens": tokens, "batch": batch, "judged_rule": rule}
                    row |= {"figure": f"{name}, by {rule}, {tokens}, B={batch}", "value": value}
                    if rule == "nearest" and tokens == "unseen":
                        row |= reach(value, ">", one_copy)
                    rows.append(row)
        rows += _load_rows(name, facts, problem, solution.slots)
    return rows


def _compared(trace: PublicTrace, num_gpus: int, say: Say) -> list[Row]:
    """Baselines, and our curve of locality against balance, one copy each."""
    rows = []
    cases: list[tuple[str, str, Objective]] = [(name, name, Objective("locality")) for name in BASELINES]
    cases.append(("balance", "ilp", Objective("balance")))
    for limit in CURVE[num_gpus]:
        name = "locality" if limit is None else f"locality ≤ {limit:g}"
        cases.append((name, "ilp", Objective("locality", max_load=limit)))
    for name, strategy, objective in cases:
        say(f"{name} on {num_gpus} GPUs")
        problem = _problem(trace, num_gpus, 0, objective)
        settings = BASELINE_SETTINGS if strategy == name else SETTINGS
        figure = f"{name}, {num_gpus} GPUs, one copy"
        try:
            solution, facts = solve_row(strategy, problem, settings, say)
        except ProblemError as error:
            facts = describe(problem, settings) | {"strategy": strategy, "notes": str(error)}
            rows.append(facts | {"plan": name, "figure": figure, "metric": "compared", "tokens": "unseen"})
            continue
        metrics = trace.judge(solution.slots, trace.half(1), problem, (MAIN_BATCH,))
        figures = metrics.by_batch_size[MAIN_BATCH]
        facts |= {"plan": name, "figure": figure, "metric": "compared", "tokens": "unseen"}
        facts |= {"pair_locality": figures.pair_locality, "top1_locality": figures.top1_transition_locality}
        facts |= {"load_mean": metrics.load_mean, "load_max": metrics.load_max}
        solved = layer_loads(solution.slots, problem.loads)
        rows.append(facts | {"solved_load_mean": float(solved.mean()), "solved_load_max": float(solved.max())})
    return rows


def case_name(objective: Objective, num_gpus: int) -> str:
    """For people."""
    kind = "pair" if objective.pairs == "all" else "top-1"
    bound = "unbounded" if objective.max_load is None else f"load ≤ {objective.max_load:g}"
    return f"{kind} locality, {num_gpus} GPUs, {bound}"


def _problem(
    trace: PublicTrace, num_gpus: int, percent: int, objective: Objective, rule: str = "level"
) -> PlacementProblem:
    workload = Workload(batch_sizes=BATCH_SIZES, exchange=EXCHANGE)  # type: ignore[arg-type]
    return trace.problem(trace.half(0), cluster_of(num_gpus), extra_slots(percent), objective, workload, rule)


def _locality(metrics: Metrics, batch: int, objective: Objective) -> float:
    figures = metrics.by_batch_size[batch]
    return figures.pair_locality if objective.pairs == "all" else figures.top1_transition_locality


def _load_rows(name: str, facts: Row, problem: PlacementProblem, slots: Slots) -> list[Row]:
    """The busiest GPU of any layer on the solved half, with its bound where there is one."""
    bound = problem.objective.max_load
    unbounded = replace(problem, objective=replace(problem.objective, max_load=None))
    value = float(layer_loads(slots, unbounded.loads).max())
    row = facts | {"figure": f"{name}, load_max, solved", "metric": "load_max", "tokens": "solved", "batch": None}
    return [row | ({"value": value} if bound is None else reach(value, "≤", bound))]
