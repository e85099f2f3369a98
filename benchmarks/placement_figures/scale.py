"""Sizes of real models: against an exact program, at 58 layers of 256 experts, and re-planning from a running plan."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.placement_figures.common import CHECKOUT, Row, Say, describe, preset, reach, solve_row
from benchmarks.placement_generators import MIDDLE, SMALL, count_routes
from placement.metrics import even_locality
from placement.migration import num_moves, plan_moves
from placement.plan import Dispatch, Workload
from placement.problem import Objective, PlacementProblem, SolverSettings
from placement.slots import slots_from_gpu
from placement.strategies import solve
from placement.strategies.chain_program import best_chain

Routes = NDArray[np.integer]

LARGE_OBJECTIVES = ("balance", "locality", "step_time")
SMALL_SLOTS = (2,) * 4
#: Re-planning: GPUs of one node, slots of each, tokens seen since, copies that may move.
REPLAN_GPUS, REPLAN_SLOTS, RECENT_TOKENS, MAX_MOVES = 8, 18, 4096, 192
REPLAN_WORKLOADS = (
    Workload(batch_sizes=(256,), exchange="alltoall"),
    Workload("prefill", (2048,), exchange="allreduce"),
)
#: Qwen3-30B-A3B in bfloat16: three matrices of 2048 × 768; hidden states of 2048.
EXPERT_BYTES, HIDDEN_STATE_BYTES = 3 * 2048 * 768 * 2, 2048 * 2
REPLAN_SETTINGS = SolverSettings(time_limit_s=0.6)
RUNNING_SETTINGS = SolverSettings(time_limit_s=20.0)


def measure(say: Say) -> list[Row]:
    """All rows of the group."""
    rows = _small(say)
    for objective in LARGE_OBJECTIVES:
        say(f"58 layers of 256 experts, {objective}")
        rows += _large(objective)
    return rows + _replan(say)


def _small(say: Say) -> list[Row]:
    """Equal to the exact dynamic program."""
    statistics = count_routes(SMALL.routes(), SMALL.num_experts)
    problem = PlacementProblem(statistics, SMALL_SLOTS, Objective("locality"))
    warm_up = replace(SMALL, num_layers=3, num_tokens=100)
    solve("ilp", replace(problem, statistics=count_routes(warm_up.routes(), warm_up.num_experts)), SolverSettings())
    say("32 layers of 8 experts")
    solution, facts = solve_row("ilp", problem, SolverSettings(), say)
    gpu = best_chain(problem.transitions, problem.loads, SMALL_SLOTS, None)
    exact = even_locality(slots_from_gpu(gpu, len(SMALL_SLOTS)), problem.transitions)
    facts |= {"tokens": "solved", "routing_tokens": SMALL.num_tokens, "routing_seed": SMALL.seed}
    name = "locality, 32 layers of 8 experts, 4 GPUs"
    return [
        facts
        | {"figure": f"{name}, against the exact program", "metric": "locality", "bound": solution.bound}
        | reach(solution.value, "≥", exact),
        facts | {"figure": f"{name}, seconds", "metric": "seconds"} | reach(solution.seconds, "<", 2.0),
    ]


def _large(objective: str) -> list[Row]:
    """In a process of its own, whose memory is measured."""
    command = [sys.executable, "-m", "benchmarks.placement_figures.large", objective]
    answer = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[Row] = json.loads(answer.stdout)
    return rows


def _replan(say: Say) -> list[Row]:
    """From a plan for other traffic: half of the tokens are now of topics that it was not made for."""
    before_TLK = MIDDLE.routes()
    others_TLK = replace(MIDDLE, seed=MIDDLE.seed + 1).routes()
    mixed_TLK = np.concatenate([before_TLK[::2], others_TLK[::2]])
    mixed_TLK = mixed_TLK[np.random.default_rng(0).permutation(len(mixed_TLK))]
    rows = []
    for workload in REPLAN_WORKLOADS:
        rows += _replan_workload(before_TLK[1::2], mixed_TLK[:RECENT_TOKENS], mixed_TLK[RECENT_TOKENS:], workload, say)
    return rows


def _replan_workload(
    before_TLK: Routes, recent_TLK: Routes, later_TLK: Routes, workload: Workload, say: Say
) -> list[Row]:
    """Solve on the tokens before, re-plan on the recent ones, judge on later ones like them."""
    say(f"48 layers of 128 experts, {workload.phase}: the running plan, and one made anew")
    first, later = _replan_problem(before_TLK, workload), _replan_problem(later_TLK, workload)
    running = solve("step_time", first, RUNNING_SETTINGS, say).slots
    anew = solve("step_time", _replan_problem(recent_TLK, workload), RUNNING_SETTINGS, say).slots
    solve("step_time", replace(first, running=running, max_moves=1), REPLAN_SETTINGS)  # loads compiled code
    started = time.perf_counter()
    problem = replace(_replan_problem(recent_TLK, workload), running=running, max_moves=MAX_MOVES)
    solution = solve("step_time", problem, REPLAN_SETTINGS)
    moves = plan_moves(running, solution.slots)
    seconds = time.perf_counter() - started
    times = {"running": later.value(running), "anew": later.value(anew)}
    facts = describe(problem, REPLAN_SETTINGS) | {"strategy": "step_time", "notes": "; ".join(solution.notes)}
    facts |= {"phase": workload.phase, "batch": workload.batch_sizes[0], "tokens": "unseen"}
    facts |= {"recent_tokens": len(recent_TLK), "later_tokens": len(later_TLK), "routing_seed": MIDDLE.seed}
    facts |= {"seconds": round(seconds, 3), "max_moves": MAX_MOVES, "moves_anew": num_moves(running, anew)}
    facts |= {f"{name}_us": value for name, value in times.items()} | {"bound_us": later.sampled_steps.lower_bound()}
    name = f"re-plan, 48 layers of 128 experts, 8 GPUs, {workload.phase}"
    return [
        facts | {"figure": f"{name}, seconds", "metric": "seconds"} | reach(seconds, "<", 1.0),
        facts | {"figure": f"{name}, copies moved", "metric": "moves"} | reach(len(moves), "≤", MAX_MOVES),
        facts
        | {"figure": f"{name}, µs per step on later tokens (anew: {times['anew']:.1f})", "metric": "step_us"}
        | reach(later.value(solution.slots), "<", times["running"]),
    ]


def _replan_problem(routes_TLK: Routes, workload: Workload) -> PlacementProblem:
    cluster = preset("h200x8")
    cluster = replace(cluster, coefficients=(cluster.coefficients_for(EXPERT_BYTES, HIDDEN_STATE_BYTES),))
    return PlacementProblem(
        count_routes(routes_TLK, MIDDLE.num_experts),
        (REPLAN_SLOTS,) * REPLAN_GPUS,
        Objective("step_time"),
        cluster=cluster,
        routes=routes_TLK,
        workload=workload,
        dispatch=Dispatch(split_above_tokens=64),
    )
