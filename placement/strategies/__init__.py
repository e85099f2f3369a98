"""Strategies: how a placement is found. All take a problem and settings and return a solution; see ``STRATEGIES``."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from placement.errors import ProblemError
from placement.problem import PlacementProblem, Solution, SolverSettings
from placement.slots import Slots, share_experts, sorted_slots
from placement.strategies.contiguous import contiguous_slots
from placement.strategies.eplb import eplb_slots
from placement.strategies.ilp import Progress, solve_ilp

Strategy = Callable[[PlacementProblem, SolverSettings, Progress], Solution]


def _contiguous(problem: PlacementProblem, settings: SolverSettings) -> Slots:
    return contiguous_slots(problem.num_layers, problem.num_experts, problem.slots_per_gpu)


def _random(problem: PlacementProblem, settings: SolverSettings) -> Slots:
    """One copy each, shuffled within every layer."""
    rng = np.random.default_rng(settings.seed)
    ends = np.cumsum(share_experts(problem.num_experts, problem.slots_per_gpu))[:-1]
    return sorted_slots([np.split(rng.permutation(problem.num_experts), ends) for _ in range(problem.num_layers)])


def _eplb(problem: PlacementProblem, settings: SolverSettings) -> Slots:
    return eplb_slots(problem.statistics.popularity, problem.slots_per_gpu)


def _without_bound(name: str, place: Callable[[PlacementProblem, SolverSettings], Slots]) -> Strategy:
    """A strategy that ignores the objective: its value is reported, nothing is proven."""

    def solve(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
        started = time.perf_counter()
        slots = place(problem, settings)
        notes = () if problem.within_load_bound(slots) else (f"{name} does not keep to max_load",)
        seconds = time.perf_counter() - started
        return Solution(slots, problem.value(slots), None, None, seconds, name, optimal=False, notes=notes)

    return solve


STRATEGIES: dict[str, Strategy] = {
    "contiguous": _without_bound("contiguous", _contiguous),
    "random": _without_bound("random", _random),
    "eplb": _without_bound("eplb", _eplb),
    "ilp": solve_ilp,
}


def solve(
    strategy: str, problem: PlacementProblem, settings: SolverSettings, progress: Progress = lambda line: None
) -> Solution:
    """Solve a problem with a strategy by name.

    Args:
        strategy: a key of ``STRATEGIES``.
        problem, settings: what to solve, and how hard.
        progress: called with one line now and then.

    Raises:
        ProblemError: the strategy is unknown, or the problem has no solution.
    """
    if strategy not in STRATEGIES:
        raise ProblemError(f"strategy {strategy!r}: expected one of {sorted(STRATEGIES)}")
    return STRATEGIES[strategy](problem, settings, progress)
