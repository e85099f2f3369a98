"""What the search for locality places, and a first placement within the load bound.

Copies that share an expert's tokens evenly never raise locality: with the layers around it fixed, an even share over
several GPUs keeps the mean of what each of them alone would keep. So copies are made only where one each cannot keep
the load bound, as few as do, and the other spare slots stay empty.

Shape suffixes: L layers, E experts, M items (one per slot: copies of experts, and empty slots), G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.errors import ProblemError
from placement.problem import PlacementProblem, SolverSettings
from placement.slots import Slots, sorted_slots
from placement.strategies.balance_program import balance_layer
from placement.strategies.balance_search import busiest_load, swap_copies
from placement.strategies.chain_search import Chain, Labels
from placement.strategies.eplb import pack_layer

#: An item that is an empty slot.
EMPTY = -1


@dataclass(frozen=True)
class Items:
    """One item per slot of a layer.

    Attributes:
        expert: int64 [L, M], the expert of each item, or ``EMPTY``.
        chain: transitions, loads and sizes of the items.
        start: int64 [L, M], GPU of every item in a placement within the load bound.
    """

    expert: Labels
    chain: Chain
    start: Labels

    @property
    def has_copies(self) -> bool:
        """Whether some expert has more than one item."""
        return bool((self.chain.twins != np.arange(self.expert.shape[1])).any())

    def slots(self, gpu: Labels) -> Slots:
        """Slots, from the GPU of every item."""
        gpus = range(self.chain.num_gpus)
        rows = zip(self.expert, gpu, strict=True)
        return sorted_slots([[experts[(row == g) & (experts != EMPTY)] for g in gpus] for experts, row in rows])


def first_items(
    problem: PlacementProblem, sizes: Sequence[int], settings: SolverSettings, time_limit_s: float
) -> Items:
    """Items with as few copies as the load bound allows, and a first placement of them.

    Args:
        problem: what to place.
        sizes: slots to use of each GPU, in all at least E.
        settings, time_limit_s: of the integer programs that find a placement where the search does not.

    Raises:
        ProblemError: the load bound cannot be kept; the message gives the least that can.
    """
    limits = problem.load_limits
    bound = np.full(problem.num_layers, np.inf) if limits is None else limits
    held = [
        _first_layer(problem, layer, sizes, float(bound[layer]), settings, time_limit_s) for layer in range(len(bound))
    ]
    expert = np.full((problem.num_layers, sum(sizes)), EMPTY, dtype=np.int64)
    start = np.repeat(np.arange(len(sizes)), sizes)[None].repeat(problem.num_layers, axis=0)
    ends = np.cumsum(sizes)
    for layer, gpus in enumerate(held):
        for end, size, experts in zip(ends, sizes, gpus, strict=True):
            expert[layer, end - size : end - size + len(experts)] = experts
    return Items(expert, _chain(problem, expert, sizes, bound), start)


def _first_layer(
    problem: PlacementProblem,
    layer: int,
    sizes: Sequence[int],
    limit: float,
    settings: SolverSettings,
    time_limit_s: float,
) -> list[list[int]]:
    """Experts on each GPU of one layer, within its limit, with the fewest copies that a search finds."""
    loads = problem.loads[layer]
    if limit == np.inf:
        ends = np.cumsum(np.minimum(sizes, _even_shares(len(loads), sizes)))
        return [part.tolist() for part in np.split(np.arange(len(loads)), ends[:-1])]
    num_gpus = sum(1 for size in sizes if size)
    counts = np.ceil(loads / max(limit, 1e-9)).clip(1, num_gpus).astype(np.int64)  # fewer break the limit on their own
    while counts.sum() <= sum(sizes):
        gpus = pack_layer(loads, counts, sizes)
        if busiest_load(loads, gpus) > limit:
            gpus = swap_copies(loads, gpus)
        if busiest_load(loads, gpus) <= limit:
            return gpus
        per_copy = np.where(counts < num_gpus, loads / counts, -1.0)
        if per_copy.max() < 0:
            break
        counts[np.argmax(per_copy)] += 1
    most_copies = 1 if sum(sizes) == len(loads) else None
    solved = balance_layer(loads, sizes, settings, time_limit_s, most_copies, enough=limit)
    if solved.busiest > limit:
        mean = loads.sum() / problem.num_gpus
        raise ProblemError(
            f"objective.max_load {problem.objective.max_load}: in MoE layer {layer} the least load found for the "
            f"busiest GPU is {solved.busiest / mean:.6g} of the mean (no placement goes below "
            f"{solved.bound / mean:.6g}); give a higher max_load, more slots_per_gpu or fewer GPUs"
        )
    return solved.gpus


def _even_shares(num_experts: int, sizes: Sequence[int]) -> list[int]:
    """Experts per GPU in proportion to its slots."""
    ends = [num_experts * int(end) // sum(sizes) for end in np.cumsum(sizes)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _chain(problem: PlacementProblem, expert: Labels, sizes: Sequence[int], limits: NDArray[np.float64]) -> Chain:
    """Transitions and loads of items: an expert's are shared evenly by its copies, empty slots have none."""
    copies = np.stack([np.bincount(row[row != EMPTY], minlength=problem.num_experts) for row in expert])
    share = np.where(expert != EMPTY, 1.0 / np.take_along_axis(copies, expert.clip(0), axis=1), 0.0)
    transitions = np.zeros((len(expert) - 1, expert.shape[1], expert.shape[1]))
    for layer, counts in enumerate(problem.transitions):
        rows, columns = expert[layer].clip(0), expert[layer + 1].clip(0)
        transitions[layer] = counts[np.ix_(rows, columns)] * np.outer(share[layer], share[layer + 1])
    loads = np.take_along_axis(problem.loads.astype(np.float64), expert.clip(0), axis=1) * share
    return Chain(transitions, loads, tuple(sizes), limits, _twins(expert))


def _twins(expert: Labels) -> Labels:
    """The next item of the same expert, in a circle, [L, M]."""
    twins = np.tile(np.arange(expert.shape[1]), (len(expert), 1))
    for layer, row in enumerate(expert):
        for e in np.flatnonzero(np.bincount(row[row != EMPTY]) > 1):
            items = np.flatnonzero(row == e)
            twins[layer, items] = np.roll(items, -1)
    return twins
