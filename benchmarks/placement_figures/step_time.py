"""Predicted step time of the ``step_time`` plan against every other strategy with the same slots, on unseen sequences.

A decode plan is solved for all batch sizes of decoding together and judged on each of them; a prefill plan is solved
and judged at one size. Differences are paired: all plans are judged on the same steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.placement_figures.common import (
    EXPERT_BYTES,
    HIDDEN_STATE_BYTES,
    PublicTrace,
    Row,
    Say,
    bounded,
    cluster_of,
    extra_slots,
    preset,
    public_trace,
    solve_row,
    with_coefficients,
)
from placement.bootstrap import step_intervals
from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.metrics import BatchSamples
from placement.plan import Workload
from placement.problem import Objective, SolverSettings
from placement.slots import Slots
from placement.strategies import solve

#: Seconds per solve by (GPUs, extra slots in %): the case with the most to choose from gets the default of `solve`.
TIME_LIMIT_S = {(4, 0): 20.0, (4, 25): 20.0, (8, 0): 20.0, (8, 25): 60.0, (16, 25): 20.0}
BASELINE_SETTINGS = SolverSettings(time_limit_s=20.0)
EXCHANGES = ("allreduce", "alltoall", "coherent")
WORKLOADS: dict[str, dict[str, Any]] = {
    "decode": {"phase": "decode", "batch_sizes": (1, 2, 4, 8, 16, 32)},
    "prefill": {"phase": "prefill", "batch_sizes": (4096,)},
}
EXTRA_PERCENTS = (0, 25)
BASELINES = ("contiguous", "random", "eplb", "lina", "exflow", "moetuner")
#: Load bounds of the locality placements by number of GPUs: with 8 and more, 1.15 cannot be kept with one copy.
LOAD_BOUND = {4: 1.15, 8: 1.30, 16: 1.30}
RESAMPLES, SEED = 1000, 0


def measure(say: Say) -> list[Row]:
    """All rows of the group."""
    trace = public_trace()
    rows = []
    for num_gpus in (4, 8):
        for percent in EXTRA_PERCENTS:
            rows += measure_one_node(trace, num_gpus, percent, say)
    nodes = with_coefficients(preset("h100x8x2"))
    workload = Workload(exchange="alltoall", **WORKLOADS["decode"])
    return rows + _compare(trace, nodes, 25, workload, _others(trace, nodes, 25, say), say)


def measure_one_node(trace: PublicTrace, num_gpus: int, percent: int, say: Say) -> list[Row]:
    """All exchange modes and workloads on GPUs of one node."""
    cluster = cluster_of(num_gpus)
    others = _others(trace, cluster, percent, say)
    rows = []
    for exchange in EXCHANGES:
        for name, settings in WORKLOADS.items():
            say(f"{num_gpus} GPUs, +{percent}%, {exchange}, {name}")
            workload = Workload(exchange=exchange, **settings)  # type: ignore[arg-type]
            rows += _compare(trace, cluster, percent, workload, others, say)
    return rows


def _others(trace: PublicTrace, cluster: Cluster, percent: int, say: Say) -> dict[str, Slots]:
    """Placements of all other strategies, which do not look at the exchange."""
    limit = LOAD_BOUND[cluster.num_gpus]
    bounded_locality = Objective("locality", max_load=limit)
    cases: list[tuple[str, str, Objective]] = [(name, name, Objective("locality")) for name in BASELINES]
    if cluster.nodes > 1:
        cases.append(("eplb_hierarchical", "eplb_hierarchical", Objective("locality")))
    cases += [("locality", "ilp", Objective("locality")), (f"locality ≤ {limit:g}", "ilp", bounded_locality)]
    cases.append(("balance", "ilp", Objective("balance")))
    problem = trace.problem(trace.half(0), cluster, extra_slots(percent), Objective("locality"))
    placed = {}
    for name, strategy, objective in cases:
        say(f"{cluster.name}, +{percent}%: {name}")
        own = trace.problem(trace.half(0), cluster, extra_slots(percent), objective)
        try:
            placed[name] = solve(strategy, own, BASELINE_SETTINGS, say).slots
        except ProblemError as error:
            say(f"{name} has no plan: {error}")
    assert all(len(slots) == problem.num_layers for slots in placed.values())
    return placed


def _compare(
    trace: PublicTrace, cluster: Cluster, percent: int, workload: Workload, others: dict[str, Slots], say: Say
) -> list[Row]:
    """One row per batch size, and one for the value on the solved half."""
    problem = trace.problem(trace.half(0), cluster, extra_slots(percent), Objective("step_time"), workload)
    settings = SolverSettings(time_limit_s=TIME_LIMIT_S[cluster.num_gpus, percent])
    ours, facts = solve_row("step_time", problem, settings, say)
    facts |= {"plan": "step_time", "phase": workload.phase, "metric": "step_us"}
    facts |= {"expert_bytes": EXPERT_BYTES, "hidden_state_bytes": HIDDEN_STATE_BYTES, "resamples": RESAMPLES}
    case = f"{cluster.name}, +{percent}%, {workload.exchange}, {workload.phase}"
    judged = {
        name: trace.judge(slots, trace.half(1), problem, workload.batch_sizes).samples
        for name, slots in ({"step_time": ours.slots} | others).items()
    }
    rows: list[Row] = [
        facts | {"figure": f"step time in µs, {case}, solved", "tokens": "solved", "batch": None} | bounded(ours)
    ]
    for batch in workload.batch_sizes:
        samples = {name: by_batch[batch] for name, by_batch in judged.items()}
        row = facts | {"figure": f"gain in step time in %, {case}, B={batch}", "tokens": "unseen", "batch": batch}
        rows.append(row | _gain(samples))
    return rows


def _gain(samples: dict[str, BatchSamples]) -> Row:
    """Ours against the best other plan of this batch size, and every plan's mean step time."""
    means = {name: float(drawn.step_us.mean()) for name, drawn in samples.items()}
    best = min((name for name in means if name != "step_time"), key=lambda name: means[name])
    saved_N = samples[best].step_us - samples["step_time"].step_us
    (interval,) = step_intervals(saved_N[np.newaxis], RESAMPLES, SEED)
    assert interval is not None
    worse = interval.high < 0
    return {
        "value": 100 * float(saved_N.mean()) / means[best],
        "relation": "≥",
        "target": 0.0,
        "ok": not worse,
        "best_other": best,
        "saved_us": float(saved_N.mean()),
        "saved_us_low": interval.low,
        "saved_us_high": interval.high,
        "worse_beyond_interval": worse,
        "steps": len(saved_N),
    } | {f"{name}_us": value for name, value in means.items()}
