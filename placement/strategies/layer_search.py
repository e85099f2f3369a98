"""Local search for the step time of one layer: swaps, other copies, more or fewer of them, judged on sampled steps.

Shape suffixes: N steps, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.sampled_steps import Held, Neighbours, SampledSteps

#: A proposal is first judged on every so many of the steps that it touches,
STEPS_PER_LOOK = 8
#: where there are at least this many,
FEWEST_LOOKED_AT = 8
#: and given up if it is worse by this many standard errors.
STANDARD_ERRORS = 2.5
#: Share of proposals that drop a copy, where there is one to spare.
DROPS = 0.05
#: Improvements below this share of the layer's time are rounding.
NEGLIGIBLE = 1e-9


@dataclass(frozen=True)
class Change:
    """Copies to remove and to add, as (expert, GPU)."""

    removed: tuple[tuple[int, int], ...]
    added: tuple[tuple[int, int], ...]

    def apply(self, held_EG: Held) -> Held:
        """The placement after the change."""
        changed = held_EG.copy()
        for copy in self.removed:
            changed[copy] = False
        for copy in self.added:
            changed[copy] = True
        return changed

    def fits(self, held_EG: Held, slots_per_gpu: NDArray[np.integer]) -> bool:
        """Whether the change can be made to a placement: what it removes is there, what it adds has room."""
        if not all(held_EG[copy] for copy in self.removed) or any(held_EG[copy] for copy in self.added):
            return False
        changed = self.apply(held_EG)
        return bool(changed.any(axis=1).all() and (changed.sum(axis=0) <= slots_per_gpu).all())


class LayerSearch:
    """The search's state: a layer's placement and what it costs in every sampled step.

    Attributes:
        held: bool [E, G], the best placement so far.
        value: its contribution to the expected step time, µs, without what no placement changes.
    """

    def __init__(
        self,
        steps: SampledSteps,
        layer: int,
        held_EG: Held,
        slots_per_gpu: Sequence[int],
        neighbours: Neighbours,
    ) -> None:
        self.steps = steps
        self.layer = layer
        self.held = held_EG
        self.slots_per_gpu = np.array(slots_per_gpu)
        self.neighbours = neighbours
        self.used = [group.active[layer].used(steps.num_experts) for group in steps.groups]
        self.weights = [group.weights[layer] for group in steps.groups]
        self.costs = [replayed.us for replayed in steps.replay(layer, held_EG, neighbours)]
        self.value = float(sum(weights @ costs for weights, costs in zip(self.weights, self.costs, strict=True)))

    def run(self, proposals: int, rng: np.random.Generator, out_of_time: Callable[[], bool]) -> None:
        """Take whatever improves among random proposals."""
        for _ in range(proposals):
            if out_of_time():
                return
            change = self.propose(rng)
            if change is not None:
                self.take_if_better(change)

    def take_if_better(self, change: Change) -> float:
        """Apply a change if it improves; the improvement in µs, 0 where it was not taken."""
        held = change.apply(self.held)
        touched = self._touched(change)
        gain, costs = self._gain(held, touched)
        if gain <= NEGLIGIBLE * self.value:
            return 0.0
        self.costs = [old.copy() for old in self.costs]
        for old, rows, new in zip(self.costs, touched, costs, strict=True):
            old[rows] = new
        self.held = held
        self.value -= gain
        return gain

    def gain_of(self, change: Change) -> float:
        """The improvement in µs that a change would be, negative where it is worse; it is not made."""
        return self._gain(change.apply(self.held), self._touched(change))[0]

    def _gain(self, held: Held, touched: list[NDArray[np.intp]]) -> tuple[float, list[NDArray[np.float64]]]:
        """The improvement and the new costs of the steps touched; -inf where a look was enough."""
        if self._looks_worse(held, touched):
            return -np.inf, []
        costs = [replayed.us for replayed in self.steps.replay(self.layer, held, self.neighbours, touched)]
        gain = sum(
            float(weights[rows] @ (old[rows] - new))
            for weights, rows, old, new in zip(self.weights, touched, self.costs, costs, strict=True)
        )
        return gain, costs

    def propose(self, rng: np.random.Generator) -> Change | None:
        """A random change that keeps every expert placed and every GPU within its slots; None where it found none."""
        spare = np.argwhere(self.held & (self.held.sum(axis=1) > 1)[:, None])
        roomy = np.flatnonzero(self.held.sum(axis=0) < self.slots_per_gpu)
        kind = rng.random()
        if len(roomy) and kind < 0.5:
            return self._addition(int(rng.choice(roomy)), (), rng)
        if len(spare) and kind > 1 - DROPS:
            return Change((_pair(spare[rng.integers(len(spare))]),), ())
        if len(spare) and kind > 0.5:
            expert, gpu = _pair(spare[rng.integers(len(spare))])
            return self._addition(gpu, ((expert, gpu),), rng)
        return self._swap(rng)

    def _addition(self, gpu: int, removed: tuple[tuple[int, int], ...], rng: np.random.Generator) -> Change | None:
        absent = np.flatnonzero(~self.held[:, gpu])
        return Change(removed, ((int(rng.choice(absent)), gpu),)) if len(absent) else None

    def _swap(self, rng: np.random.Generator) -> Change | None:
        occupied = np.flatnonzero(self.held.any(axis=0))
        if len(occupied) < 2:
            return None
        g, h = (int(gpu) for gpu in rng.choice(occupied, size=2, replace=False))
        a, b = (int(rng.choice(np.flatnonzero(self.held[:, gpu]))) for gpu in (g, h))
        if self.held[a, h] or self.held[b, g]:
            return None
        return Change(((a, g), (b, h)), ((a, h), (b, g)))

    def _touched(self, change: Change) -> list[NDArray[np.intp]]:
        """The steps of each group that route to an expert of the change; all others cost the same."""
        experts = sorted({expert for expert, _ in (*change.removed, *change.added)})
        return [np.flatnonzero(used[experts].any(axis=0)) for used in self.used]

    def _looks_worse(self, held: Held, touched: list[NDArray[np.intp]]) -> bool:
        """Whether a change is clearly worse on a part of the steps that it touches."""
        if sum(map(len, touched)) < FEWEST_LOOKED_AT * STEPS_PER_LOOK:
            return False
        looked_at = [rows[::STEPS_PER_LOOK] for rows in touched]
        costs = [replayed.us for replayed in self.steps.replay(self.layer, held, self.neighbours, looked_at)]
        worse = np.concatenate(
            [
                weights[rows] * (new - old[rows])
                for weights, rows, old, new in zip(self.weights, looked_at, self.costs, costs, strict=True)
            ]
        )
        return bool(worse.sum() > STANDARD_ERRORS * worse.std() * np.sqrt(len(worse)))


def _pair(row: NDArray[np.integer]) -> tuple[int, int]:
    return int(row[0]), int(row[1])


class Deadline:
    """Says when to stop: at a time, or when told."""

    def __init__(self, seconds: float) -> None:
        self.at = time.perf_counter() + seconds
        self.told = False

    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self.at - time.perf_counter())

    def passed(self) -> bool:
        """Whether it is time to stop."""
        return self.told or time.perf_counter() >= self.at
