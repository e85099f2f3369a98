"""Re-planning from a running plan: the best placement that moves at most so many copies of experts.

Every layer yields a row of placements, each a few moves further from the running one and better. How far each layer
goes is then chosen exactly, by a dynamic program over the moves that are left (a multiple-choice knapsack).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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


def find_stages(
    pool: ThreadPoolExecutor,
    start: Callable[[int], LayerSearch],
    running: Sequence[Held],
    max_moves: int,
    settings: SolverSettings,
    deadline: Deadline,
) -> tuple[list[list[Stage]], bool]:
    """Placements of every layer with at most ``max_moves`` copies moved, the running one first; and whether time ended
    the search of a layer.

    Args:
        pool: runs layers side by side.
        start: a layer's search, at the running placement.
        running: per layer bool [E, G].
        max_moves: copies that may be transferred.
        settings: seed and rounds.
        deadline: when to stop; told on Ctrl-C, after which what was found until then is returned.
    """
    stages = [[Stage(0, 0.0, held_EG)] for held_EG in running]
    if max_moves == 0:
        return stages, False
    share = deadline.left() * settings.workers / len(running)

    def improve(layer: int) -> bool:
        own = Deadline(min(share, deadline.left()))
        return _add_stages(stages[layer], start(layer), max_moves, settings, deadline, own)

    futures = [pool.submit(improve, layer) for layer in range(len(running))]
    try:
        ended = [future.result() for future in futures]
        return stages, any(ended)
    except KeyboardInterrupt:
        deadline.told = True
        wait(futures)
        return stages, True


def _add_stages(
    stages: list[Stage],
    search: LayerSearch,
    max_moves: int,
    settings: SolverSettings,
    deadline: Deadline,
    own: Deadline,
) -> bool:
    """Append placements of one layer, in the order of gains: the most gainful changes first; whether time ended it.

    Half of the layer's time goes to judging random changes of the running placement, half to taking the best of them.
    """
    running, first = search.held, search.value
    rng = np.random.default_rng([settings.seed, search.layer])
    half = Deadline(own.left() / 2)
    judged: list[tuple[float, int, Change]] = []
    for number in range(settings.search_rounds * PROPOSALS_PER_ROUND):
        if deadline.passed() or half.passed():
            break
        change = search.propose(rng)
        if change is not None and len(change.added) <= max_moves and (gain := search.gain_of(change)) > 0:
            judged.append((-gain / max(1, len(change.added)), number, change))
    for _, _, change in sorted(judged, key=lambda entry: entry[:2]):
        if deadline.passed() or own.passed():
            break
        if not change.fits(search.held, search.slots_per_gpu):
            continue
        moves = count_moves(running, change.apply(search.held))
        if moves <= max_moves and search.take_if_better(change) > 0:
            stages.append(Stage(moves, first - search.value, search.held))
    return half.passed() or deadline.passed()


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
