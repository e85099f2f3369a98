"""Re-planning from a running plan: the best placement that moves at most so many copies of experts.

Every layer yields a row of placements, each a few moves further from the running one and better. How far each layer
goes is then chosen exactly, by a dynamic program over the moves that are left (a multiple-choice knapsack).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.problem import SolverSettings
from placement.sampled_steps import Held
from placement.strategies.layer_search import Change, Deadline, LayerSearch

#: Proposals judged per layer for every ``solver.search_rounds``.
PROPOSALS_PER_ROUND = 2


@dataclass(frozen=True)
class Stage:
    """A placement of one layer on the way from the running one: copies moved, time saved in µs."""

    moves: int
    gain: float
    held: Held


def best_moves(
    pool: ThreadPoolExecutor, searches: list[LayerSearch], max_moves: int, settings: SolverSettings, deadline: Deadline
) -> list[Held]:
    """The best placement of every layer, bool [E, G], with at most ``max_moves`` copies moved in all.

    Args:
        pool: runs layers side by side.
        searches: one per layer, at the running placement.
        max_moves: copies that may be transferred.
        settings: seed and rounds.
        deadline: when to stop.
    """
    share = deadline.left() * settings.workers / len(searches)

    def improve(search: LayerSearch) -> list[Stage]:
        return _stages(search, max_moves, settings, Deadline(min(share, deadline.left())))

    stages = list(pool.map(improve, searches))
    return choose_stages(stages, max_moves)


def _stages(search: LayerSearch, max_moves: int, settings: SolverSettings, deadline: Deadline) -> list[Stage]:
    """Placements of one layer, in the order of moves: the most gainful changes first.

    Half of the time goes to judging random changes of the running placement, half to taking the best of them.
    """
    running, first = search.held, search.value
    rng = np.random.default_rng([settings.seed, search.layer])
    half = Deadline(deadline.left() / 2)
    judged: list[tuple[float, int, Change]] = []
    for number in range(settings.search_rounds * PROPOSALS_PER_ROUND):
        if half.passed():
            break
        change = search.propose(rng)
        if change is not None and (gain := search.gain_of(change)) > 0:
            judged.append((-gain / max(1, len(change.added)), number, change))
    stages = [Stage(0, 0.0, running)]
    for _, _, change in sorted(judged, key=lambda entry: entry[:2]):
        if deadline.passed():
            break
        if not change.fits(search.held, search.slots_per_gpu) or search.take_if_better(change) <= 0:
            continue
        moves = count_moves(running, search.held)
        if moves > max_moves:
            break
        stages.append(Stage(moves, first - search.value, search.held))
    return stages


def count_moves(before: Held, after: Held) -> int:
    """Copies that the second placement holds and the first does not."""
    return int((after & ~before).sum())


def choose_stages(stages: list[list[Stage]], max_moves: int) -> list[Held]:
    """One stage per layer with the greatest gain in sum, and at most ``max_moves`` moves in sum."""
    most = min(max_moves, sum(max(stage.moves for stage in layer) for layer in stages))
    best: NDArray[np.float64] = np.zeros(most + 1)  # by moves that may be used by the layers so far
    choices = []
    for layer in stages:
        options = np.full((len(layer), most + 1), -np.inf)
        for index, stage in enumerate(layer):
            if stage.moves <= most:
                options[index, stage.moves :] = best[: most + 1 - stage.moves] + stage.gain
        choices.append(options.argmax(axis=0))
        best = options.max(axis=0)
    left = most
    chosen = []
    for layer, choice in zip(reversed(stages), reversed(choices), strict=True):
        stage = layer[choice[left]]
        left -= stage.moves
        chosen.append(stage.held)
    return chosen[::-1]
