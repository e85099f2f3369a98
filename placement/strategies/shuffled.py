"""Random placement: one copy each, shuffled within every layer."""

from __future__ import annotations

import time

import numpy as np

from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import share_experts, sorted_slots


def solve_random(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """One copy each, shuffled within every layer; spare slots stay empty."""
    started = time.perf_counter()
    rng = np.random.default_rng(settings.seed)
    ends = np.cumsum(share_experts(problem.num_experts, problem.slots_per_gpu))[:-1]
    slots = sorted_slots([np.split(rng.permutation(problem.num_experts), ends) for _ in range(problem.num_layers)])
    return Solution.of(problem, slots, "random", started)
