"""Balance: the busiest GPU of every layer has as few token–expert pairs as possible, each layer alone.

Copies are part of the program, and the bound always holds. Where the tokens solved on are at hand, a little of what
the search gained over EPLB is given back for placements whose busiest load varies less from one part of the tokens to
another: many placements are near the optimum, and on other tokens they differ by far more than on these.

Shape suffixes: L layers, E experts, R resamples.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from placement.metrics import layer_loads
from placement.problem import PlacementProblem, Progress, SolverSettings
from placement.slots import Slots, sorted_slots
from placement.strategies.balance_program import balance_layer, least_busiest
from placement.strategies.balance_search import busiest_load, descend, harden, tail_load
from placement.strategies.eplb import eplb_slots
from placement.strategies.spare_slots import fill_spare_slots

#: Groups of tokens at most, groups where the sequences are not known, and resamples of groups.
MOST_GROUPS, BLOCKS, RESAMPLES = 200, 100, 128
#: Groups in a resample. Fewer than there are: other tokens differ from these more than these from their source.
SHARE_DRAWN = 0.7
#: Most of the mean busiest load, relative to even, that is given back, and most of what was gained over EPLB.
GIVEN_BACK, SHARE_OF_GAIN = 0.01, 0.75
#: Descents per layer and size: slots ** 2 × descents.
HARDENING_WORK = 60 * 64**2
#: Share of the time limit after which no layer's optimum is searched any more, where hardening follows.
SEARCH_SHARE = 0.6


def solve_balance(
    problem: PlacementProblem, settings: SolverSettings, progress: Progress
) -> tuple[Slots, float, list[str]]:
    """Every layer alone: slots, the bound on the mean busiest load, notes.

    Ctrl-C and the time limit end it with what was found until then.
    """
    return _Balance(problem, settings, progress).solve()


class _Balance:
    """One run of the balance objective; loads relative to even are in units of a layer's mean GPU."""

    def __init__(self, problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> None:
        self.problem, self.settings, self.progress = problem, settings, progress
        self.started = time.perf_counter()
        self.mean = problem.loads.sum(axis=1) / problem.num_gpus
        self.eplb = eplb_slots(problem.loads, problem.slots_per_gpu)
        self.layers: list[list[list[int]]] = []
        self.bounds: list[float] = []
        self.notes: list[str] = []

    def solve(self) -> tuple[Slots, float, list[str]]:
        """Slots, bound, notes."""
        for loads, packed in zip(self.problem.loads, self.eplb, strict=True):
            start = [list(held) for held in packed]
            self.layers.append(min((start, descend(loads, start)), key=lambda gpus: busiest_load(loads, gpus)))
            most = min(sum(map(bool, packed)), 1 + sum(self.problem.slots_per_gpu) - len(loads))
            self.bounds.append(least_busiest(loads, self.problem.slots_per_gpu, most))
        self._report("first plan")
        try:
            self._search()
            routes = self.problem.routes
            if routes is not None and len(routes) and self.problem.num_gpus > 1 and self._time_left():
                self._harden(routes)
        except KeyboardInterrupt:
            self.notes.append("interrupted: this is the best placement found until then")
        if not self._time_left():
            self.notes.append(f"the time limit of {self.settings.time_limit_s:g} s cut the search")
        slots = fill_spare_slots_for_balance(self.problem, sorted_slots(self.layers))
        bound, value = self._bound(), self.problem.value(slots)
        assert bound <= value * (1 + 1e-6), (bound, value)
        return slots, min(bound, value), self.notes  # equal but for rounding where it was above

    def _search(self) -> None:
        """The optimum of every layer, or near it."""
        deadline = self._deadline(1.0 if self.problem.routes is None else SEARCH_SHARE)
        for layer, loads in enumerate(self.problem.loads):
            left = (deadline - time.perf_counter()) / (self.problem.num_layers - layer)
            if left <= 0:
                break
            solved = balance_layer(loads, self.problem.slots_per_gpu, self.settings, left)
            if solved.busiest < busiest_load(loads, self.layers[layer]):
                self.layers[layer] = solved.gpus
            self.bounds[layer] = max(self.bounds[layer], solved.bound)
            self._report(f"layer {layer + 1} of {self.problem.num_layers}")
            if solved.interrupted:
                raise KeyboardInterrupt

    def _harden(self, routes: NDArray[np.integer]) -> None:
        """Placements that are near the optimum, and better on other tokens."""
        loads = self.problem.loads
        samples = self._resampled(routes if self.problem.objective.pairs == "all" else routes[:, :, :1])
        limits = self._limits(samples)
        kicks = max(1, min(60, HARDENING_WORK // sum(self.problem.slots_per_gpu) ** 2))
        for layer in range(len(loads)):
            left = (self._deadline(1.0) - time.perf_counter()) / (len(loads) - layer)
            rng = np.random.default_rng((self.settings.seed, layer))
            self.layers[layer] = harden(
                loads[layer],
                samples[layer],
                self.layers[layer],
                limits[layer],
                kicks,
                rng,
                time.perf_counter() + left,
            )
            self._report(f"layer {layer + 1} of {len(loads)} hardened for other tokens")

    def _resampled(self, routes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Loads of resampled tokens, [L, R, E], each with the same sum as the loads solved on.

        Whole sequences are drawn, since tokens of one sequence choose alike; where they are not known, blocks.
        Source: block bootstrap, Künsch (1989), The jackknife and the bootstrap for general stationary observations.
        """
        group = _groups(len(routes), self.problem.sequences)
        num_groups, num_experts = int(group.max()) + 1, self.problem.num_experts
        rng = np.random.default_rng(self.settings.seed)
        size = math.ceil(SHARE_DRAWN * num_groups)
        drawn = rng.multinomial(size, np.full(num_groups, 1 / num_groups), size=RESAMPLES)
        samples = np.empty((self.problem.num_layers, RESAMPLES, num_experts))
        for layer, total in enumerate(self.problem.loads.sum(axis=1)):
            keys = group[:, None] * num_experts + routes[:, layer]
            counts = np.bincount(keys.ravel(), minlength=num_groups * num_experts).reshape(num_groups, num_experts)
            rows = drawn @ counts
            samples[layer] = rows * (total / rows.sum(axis=1, keepdims=True).clip(1))
        return samples

    def _limits(self, samples: NDArray[np.float64]) -> NDArray[np.float64]:
        """Most load of a GPU per layer, [L]: layers whose loads vary most may give most back."""
        slots = sorted_slots(self.layers)
        best, eplb = layer_loads(slots, self.problem.loads), layer_loads(self.eplb, self.problem.loads)
        tails = np.array([tail_load(rows, gpus) for rows, gpus in zip(samples, slots, strict=True)])
        varies = (np.divide(tails, self.mean, out=best.copy(), where=self.mean > 0) - best).clip(0) ** 2
        given_back = max(0.0, min(GIVEN_BACK, SHARE_OF_GAIN * float(eplb.mean() - best.mean())))
        slack = given_back * varies / max(float(varies.mean()), 1e-12)
        worst = best.max() + SHARE_OF_GAIN * max(0.0, float(eplb.max() - best.max()))
        limits: NDArray[np.float64] = np.maximum(best, np.minimum(best + slack, worst)) * self.mean
        return limits * (1 + 1e-12)

    def _bound(self) -> float:
        relative = np.divide(self.bounds, self.mean, out=np.ones(len(self.mean)), where=self.mean > 0)
        return float(relative.mean())

    def _time_left(self) -> bool:
        return time.perf_counter() < self._deadline(1.0)

    def _deadline(self, share: float) -> float:
        return self.started + share * self.settings.time_limit_s

    def _report(self, stage: str) -> None:
        value, bound = float(layer_loads(sorted_slots(self.layers), self.problem.loads).mean()), self._bound()
        self.progress(f"{stage}: busiest {value:.4f} of the mean, bound {bound:.4f}, gap {(value - bound) / value:.2%}")


def _groups(num_tokens: int, sequences: NDArray[np.integer] | None) -> NDArray[np.int64]:
    """The group of every token, int64 [T]: its sequence, or neighbouring sequences together, or a block of tokens."""
    if sequences is None:
        return np.arange(num_tokens) * min(BLOCKS, num_tokens) // num_tokens
    distinct, index = np.unique(sequences, return_inverse=True)
    grouped: NDArray[np.int64] = index * min(MOST_GROUPS, len(distinct)) // len(distinct)
    return grouped


def fill_spare_slots_for_balance(problem: PlacementProblem, slots: Slots) -> Slots:
    """Use slots that the programs left empty, as long as no layer's busiest load rises."""
    limits = np.array([busiest_load(loads, gpus) for loads, gpus in zip(problem.loads, slots, strict=True)])
    nothing = np.zeros_like(problem.transitions)
    return fill_spare_slots(slots, problem.slots_per_gpu, nothing, problem.loads, limits)
