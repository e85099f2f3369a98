"""One objective at 58 layers of 256 experts, in a process of its own: ``python -m benchmarks.placement_figures.large``.

Prints its rows as JSON. Timing begins after the counts, with compiled code loaded.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace

from benchmarks.placement_figures.common import Row, describe, preset, reach
from benchmarks.placement_generators import LARGE, SyntheticRouting, count_routes
from placement.cluster import Cluster
from placement.metrics import layer_loads
from placement.plan import Dispatch, Workload
from placement.problem import Objective, PlacementProblem, Solution, SolverSettings
from placement.strategies import solve

#: H100s: nodes, GPUs of a node, slots of a GPU.
NODES, GPUS_PER_NODE, SLOTS = 4, 8, 9
#: DeepSeek-V3 in 8 bits: three matrices of 7168 × 2048; hidden states of 7168 in bfloat16.
EXPERT_BYTES, HIDDEN_STATE_BYTES = 3 * 7168 * 2048, 7168 * 2
WORKLOAD = Workload(batch_sizes=(64, 512), exchange="alltoall")
STRATEGY = {"balance": "ilp", "locality": "ilp", "step_time": "step_time"}
#: Time limits: of a first plan, and of a final one.
FIRST_S, FINAL_S = 0.5, 50.0
MOST_GIB = 4.0


def measure(objective: str) -> list[Row]:
    """Rows of one objective."""
    problem = _problem(LARGE, objective)
    warm_up = _problem(replace(LARGE, num_layers=2, num_tokens=500), objective)
    solve(STRATEGY[objective], warm_up, SolverSettings(time_limit_s=2.0))
    first, first_facts, _ = _timed(problem, FIRST_S)
    final, facts, first_line_s = _timed(problem, FINAL_S)
    eplb = solve("eplb", problem, SolverSettings())
    for solution, described in ((first, first_facts), (final, facts)):
        described |= {"load_mean": float(layer_loads(solution.slots, problem.loads).mean()), "eplb": eplb.value}
        described |= {"value": solution.value, "bound": solution.bound, "gap": solution.gap}
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = f"{objective}, 58 layers of 256 experts, 32 GPUs of 9 slots"
    facts |= {"first_line_seconds": round(first_line_s, 3)}
    rows = [
        first_facts
        | {"figure": f"{name}, first plan, seconds", "metric": "first_seconds"}
        | reach(first_facts["seconds"], "<", 2.0),
        facts | {"figure": f"{name}, final, seconds", "metric": "seconds"} | reach(facts["seconds"], "<", 60.0),
        facts | {"figure": f"{name}, peak memory in GiB", "metric": "peak_gib"} | reach(peak_gib, "<", MOST_GIB),
    ]
    better = "≥" if objective == "locality" else "≤"
    for when, solution, described in (("first plan", first, first_facts), ("final", final, facts)):
        row = described | {"figure": f"{name}, {when}, value against EPLB's", "metric": f"{objective}_value"}
        rows.append(row | reach(solution.value, better, eplb.value))
    return rows


def _timed(problem: PlacementProblem, time_limit_s: float) -> tuple[Solution, Row, float]:
    """A solution, what a row says of it, and the seconds after which a first value was told."""
    lines: list[float] = []
    settings = SolverSettings(time_limit_s=time_limit_s)
    started = time.perf_counter()
    solution = solve(
        STRATEGY[problem.objective.name], problem, settings, lambda line: lines.append(time.perf_counter() - started)
    )
    seconds = time.perf_counter() - started
    facts = describe(problem, settings) | {"strategy": STRATEGY[problem.objective.name], "seconds": round(seconds, 3)}
    facts |= {"notes": "; ".join(solution.notes), "tokens": "solved", "batch": None}
    facts |= {"routing_tokens": LARGE.num_tokens, "routing_seed": LARGE.seed}
    return solution, facts, min(lines, default=seconds)


def _problem(routing: SyntheticRouting, objective: str) -> PlacementProblem:
    routes = routing.routes()
    return PlacementProblem(
        count_routes(routes, routing.num_experts),
        (SLOTS,) * (NODES * GPUS_PER_NODE),
        Objective(objective),  # type: ignore[arg-type]
        cluster=_cluster(),
        routes=routes,
        workload=WORKLOAD,
        dispatch=Dispatch(split_above_tokens=64),
    )


def _cluster() -> Cluster:
    """Four nodes of the preset h100x8x2."""
    two = preset("h100x8x2")
    memory = (two.expert_memory_bytes[0],) * (NODES * GPUS_PER_NODE)
    four = replace(two, name=f"{NODES} nodes of {GPUS_PER_NODE} H100", nodes=NODES, expert_memory_bytes=memory)
    return replace(four, coefficients=(four.coefficients_for(EXPERT_BYTES, HIDDEN_STATE_BYTES),))


if __name__ == "__main__":
    json.dump(measure(sys.argv[1]), sys.stdout)
