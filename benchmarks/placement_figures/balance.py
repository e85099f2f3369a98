"""Balance on the public trace against EPLB with the same slots, over several splits of the sequences."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from benchmarks.placement_figures.common import (
    ROUNDING,
    Mask,
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
from placement.metrics import layer_loads
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.strategies import solve
from profiler.statistics import RoutingStatistics

SETTINGS = SolverSettings(time_limit_s=20.0)
#: GPUs, extra slots in percent of one copy of each expert.
CELLS = (*((gpus, percent) for gpus in (4, 8) for percent in (0, 25, 50, 100)), (16, 0), (16, 50), (16, 100))
RANDOM_HALVES = 4
#: The split whose unseen figures have something to reach; the others show how much is luck.
MAIN_SPLIT = "even→odd"
PROCESSES = 2
#: Unseen, ours may exceed EPLB's by this share.
TOLERANCE = 1.005
#: Loads of the one layer whose optimum is known, on 8 GPUs of 2 slots; and that optimum.
KNOWN_LOADS, KNOWN_SLOTS, KNOWN_OPTIMUM = (600, 560, 120, 120, 20, 10, 10, 10), (2,) * 8, 196.67
PLACES = 2


def measure(say: Say) -> list[Row]:
    """All rows of the group; cells are solved side by side, in processes of their own."""
    rows = _known_optimum(say)
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        for (num_gpus, percent), cell in zip(CELLS, pool.map(_cell, *zip(*CELLS, strict=True)), strict=True):
            say(f"{num_gpus} GPUs, +{percent}% done")
            rows += cell
    return rows


def _cell(num_gpus: int, percent: int) -> list[Row]:
    """All splits of one number of GPUs and slots."""
    trace = public_trace()
    rows: list[Row] = []
    for split, solved_T in _splits(trace).items():
        rows += _judge_split(trace, num_gpus, percent, split, solved_T)
    return rows + [_count(rows, metric) for metric in ("load_mean", "load_max")]


def _splits(trace: PublicTrace) -> dict[str, Mask]:
    """Tokens to solve on by name of the split; the others are judged on."""
    splits = {MAIN_SPLIT: trace.half(0), "odd→even": trace.half(1)}
    return splits | {f"random half {seed}": trace.random_half(seed) for seed in range(RANDOM_HALVES)}


def _judge_split(trace: PublicTrace, num_gpus: int, percent: int, split: str, solved_T: Mask) -> list[Row]:
    """``load_mean`` and ``load_max`` of ours and of EPLB, solved and unseen."""
    cluster = cluster_of(num_gpus)
    problem = trace.problem(solved_T, cluster, extra_slots(percent), Objective("balance"))
    unseen = trace.problem(~solved_T, cluster, extra_slots(percent), Objective("balance"))
    ours, facts = solve_row("ilp", problem, SETTINGS, lambda line: None)
    eplb = solve("eplb", problem, SETTINGS)
    facts |= {"split": split, "plan": "balance"}
    rows = []
    for tokens, judged in (("solved", problem), ("unseen", unseen)):
        found, theirs = layer_loads(ours.slots, judged.loads), layer_loads(eplb.slots, judged.loads)
        for metric, value, reference in (
            ("load_mean", float(found.mean()), float(theirs.mean())),
            ("load_max", float(found.max()), float(theirs.max())),
        ):
            row = facts | {"metric": metric, "tokens": tokens, "eplb": reference, "ratio": value / reference}
            row |= {"figure": f"{metric}, {num_gpus} GPUs, +{percent}%, {tokens}, {split}"}
            if tokens == "solved" and metric == "load_mean":
                row |= {"bound": ours.bound, "gap": ours.gap}
                assert ours.bound is not None
                eplb_is_optimal = reference <= ours.bound * (1 + ROUNDING)
                row |= reach(value, "≤" if eplb_is_optimal else "<", reference)
            elif tokens == "solved":
                row |= reach(value, "≤", reference)
            else:
                within = reach(value, "≤", TOLERANCE * reference)
                row |= {"within": within["ok"]} | (within if split == MAIN_SPLIT else {"value": value})
            rows.append(row)
    return rows


def _count(cell: list[Row], metric: str) -> Row:
    """In how many splits a cell's unseen figure is within the tolerance."""
    judged = [row for row in cell if row["metric"] == metric and row["tokens"] == "unseen"]
    kept = sum(row["within"] for row in judged)
    shared = {key: judged[0][key] for key in ("layers", "experts", "gpus", "slots", "extra_percent", "objective")}
    return shared | {
        "figure": f"{metric}, {shared['gpus']} GPUs, +{shared['extra_percent']}%, unseen, splits within 0.5% of EPLB",
        "metric": f"{metric}_splits",
        "tokens": "unseen",
        "value": kept,
        "splits": len(judged),
        "mean_ratio": float(np.mean([row["ratio"] for row in judged])),
        "worst_ratio": max(row["ratio"] for row in judged),
    }


def _known_optimum(say: Say) -> list[Row]:
    """One layer whose least busiest load is known."""
    loads = np.array([KNOWN_LOADS])
    none = np.zeros((0, loads.shape[1], loads.shape[1]), dtype=np.int64)
    statistics = RoutingStatistics(0, loads, np.zeros_like(loads), none, none, none)
    problem = PlacementProblem(statistics, KNOWN_SLOTS, Objective("balance"))
    say("the known optimum")
    ours, facts = solve_row("ilp", problem, SETTINGS, say)
    mean = loads.sum() / len(KNOWN_SLOTS)
    eplb = solve("eplb", problem, SETTINGS).value * mean
    row = facts | {
        "plan": "balance",
        "metric": "busiest",
        "tokens": "solved",
        "loads": str(list(KNOWN_LOADS)),
        "eplb": eplb,
    }
    busiest = reach(round(ours.value * mean, PLACES), "≤", KNOWN_OPTIMUM)
    proven = bounded(ours)
    return [
        row | {"figure": "busiest load, 8 experts on 8 GPUs of 2 slots"} | busiest,
        row
        | {"figure": "the same, gap of its proof", "metric": "gap", "bound": ours.bound}
        | reach(proven["gap"], "≤", 0.0),
    ]
