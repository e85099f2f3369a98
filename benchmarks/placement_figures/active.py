"""Active experts of the busiest GPU in small decode steps, against EPLB's copies under the same dispatch rule."""

from __future__ import annotations

from benchmarks.placement_figures.common import (
    PublicTrace,
    Row,
    Say,
    bounded,
    cluster_of,
    extra_slots,
    public_trace,
    reach,
    solve_row,
)
from placement.plan import Workload
from placement.problem import Objective, SolverSettings
from placement.strategies import solve

SETTINGS = SolverSettings(time_limit_s=60.0)
#: Where nothing is to reach: points of the plot.
BRIEF_SETTINGS = SolverSettings(time_limit_s=20.0)
BATCH_SIZES = (1, 4, 8)
CELLS = tuple((gpus, percent) for gpus in (4, 8) for percent in (0, 25, 50, 100))
OTHERS = ("eplb", "contiguous", "random")
#: Active ratio to reach by GPUs, extra slots in percent and batch size.
TARGETS = {
    (4, 25): (1.35, 1.03, 1.01),
    (8, 25): (1.12, 1.12, 1.08),
    (8, 100): (1.01, 1.01, 1.01),
}


def measure(say: Say) -> list[Row]:
    """All rows of the group."""
    rows = []
    for num_gpus, percent in CELLS:
        say(f"{num_gpus} GPUs, +{percent}%")
        rows += _cell(public_trace(), num_gpus, percent, say)
    return rows


def _cell(trace: PublicTrace, num_gpus: int, percent: int, say: Say) -> list[Row]:
    workload = Workload(batch_sizes=BATCH_SIZES, exchange="allreduce")
    problem = trace.problem(trace.half(0), cluster_of(num_gpus), extra_slots(percent), Objective("step_time"), workload)
    settings = SETTINGS if (num_gpus, percent) in TARGETS else BRIEF_SETTINGS
    ours, facts = solve_row("step_time", problem, settings, say)
    plans = {"step_time": ours.slots} | {name: solve(name, problem, settings).slots for name in OTHERS}
    rows = []
    for tokens, half in (("unseen", 1), ("solved", 0)):
        judged = {name: trace.judge(slots, trace.half(half), problem, BATCH_SIZES) for name, slots in plans.items()}
        for index, batch in enumerate(BATCH_SIZES):
            ratio = {name: metrics.by_batch_size[batch].active_ratio for name, metrics in judged.items()}
            row = facts | {"figure": f"active ratio, {num_gpus} GPUs, +{percent}%, B={batch}, {tokens}"}
            row |= {"plan": "step_time", "metric": "active_ratio", "tokens": tokens, "batch": batch}
            row |= {name: ratio[name] for name in OTHERS}
            targets = TARGETS.get((num_gpus, percent)) if tokens == "unseen" else None
            value = ratio["step_time"]
            rows.append(row | ({"value": value} if targets is None else reach(value, "≤", targets[index])))
    name = f"expected step time in µs, {num_gpus} GPUs, +{percent}%, solved"
    row = facts | {"figure": name, "plan": "step_time", "metric": "step_us", "tokens": "solved", "batch": None}
    rows.append(row | bounded(ours))
    return rows
