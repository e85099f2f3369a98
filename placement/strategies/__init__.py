"""Strategies: how a placement is found. All take a problem and settings and return a solution; see ``STRATEGIES``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from placement.errors import ProblemError
from placement.problem import PlacementProblem, Progress, Solution, SolverSettings

Strategy = Callable[[PlacementProblem, SolverSettings, Progress], Solution]

#: Name → module of this package and its function. Loaded when used: some need compilers, some solvers.
STRATEGIES: dict[str, str] = {
    "contiguous": "contiguous:solve_contiguous",
    "random": "shuffled:solve_random",
    "eplb": "eplb:solve_eplb",
    "eplb_hierarchical": "eplb:solve_eplb_hierarchical",
    "lina": "lina:solve_lina",
    "exflow": "exflow:solve_exflow",
    "moetuner": "moetuner:solve_moetuner",
    "ilp": "ilp:solve_ilp",
    "step_time": "step_time:solve_step_time",
}


def load_strategy(name: str) -> Strategy:
    """A strategy by its name.

    Raises:
        ProblemError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ProblemError(f"strategy {name!r}: expected one of {sorted(STRATEGIES)}")
    module, function = STRATEGIES[name].split(":")
    strategy: Strategy = getattr(import_module(f"{__name__}.{module}"), function)
    return strategy


def solve(
    strategy: str, problem: PlacementProblem, settings: SolverSettings, progress: Progress = lambda line: None
) -> Solution:
    """Solve a problem with a strategy by name.

    Args:
        strategy: a key of ``STRATEGIES``.
        problem, settings: what to solve, and how hard.
        progress: called with one line now and then.

    Raises:
        ProblemError: the strategy is unknown, cannot keep to ``max_moves``, or the problem has no solution.
    """
    if problem.max_moves is not None and (strategy, problem.objective.name) != ("step_time", "step_time"):
        raise ProblemError(
            f"max_moves {problem.max_moves} with strategy {strategy} and objective {problem.objective.name}: only "
            "strategy=step_time with objective=step_time keeps to it; give these, or max_moves=null"
        )
    return load_strategy(strategy)(problem, settings, progress)
