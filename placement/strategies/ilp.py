"""The objectives over counts, ``locality`` and ``balance``: integer programs where they are strong, search around them.

Values and bounds refer to the tokens solved on.
"""

from __future__ import annotations

import time

from placement.errors import ProblemError
from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.strategies.balance import solve_balance
from placement.strategies.locality import solve_locality

OBJECTIVES = {"locality": solve_locality, "balance": solve_balance}


def solve_ilp(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Solve for the problem's objective.

    Raises:
        ProblemError: the load bound cannot be kept (the message gives the least that can), or the objective is another.
    """
    started = time.perf_counter()
    name = problem.objective.name
    if name not in OBJECTIVES:
        raise ProblemError(
            f"strategy ilp with objective {name}: expected one of {list(OBJECTIVES)}; use strategy=step_time"
        )
    slots, bound, notes = OBJECTIVES[name](problem, settings, progress)
    return Solution.of(problem, slots, "ilp", started, bound, notes)
