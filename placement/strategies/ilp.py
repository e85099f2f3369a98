"""The default strategy: integer programs where they are strong, search and dynamic programs around them.

Values and bounds refer to the tokens solved on. Under ``locality`` without spare slots the bound holds for every
placement with these slots and load bound. With spare slots one copy of each expert is placed first and the rest is
filled greedily; no bound is known then. Under ``balance`` copies are part of the program and the bound always holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from placement.errors import ProblemError
from placement.problem import PlacementProblem, Solution, SolverSettings
from placement.slots import Slots, share_experts, slots_from_gpu, sorted_slots
from placement.strategies.annealing import Items, anneal, single_copies
from placement.strategies.balance_program import balance_layer
from placement.strategies.balance_search import busiest_load, descend, swap_copies
from placement.strategies.chain_program import best_chain, is_small
from placement.strategies.eplb import copy_counts, pack_layer
from placement.strategies.locality_program import is_tractable, pair_bound, solve_locality_program
from placement.strategies.sweeps import assignment_sweeps, fill_spare_slots

Progress = Callable[[str], None]

CHAINS = 16
NO_BOUND_WITH_COPIES = "no bound is known for locality with spare slots"


def solve_ilp(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Solve for the problem's objective.

    Raises:
        ProblemError: the load bound cannot be kept; the message gives the least that can.
    """
    started = time.perf_counter()
    search = _Locality(problem, settings, progress) if problem.objective.name == "locality" else None
    slots, bound, notes = search.solve() if search else _balance(problem, settings, progress)
    value = problem.value(slots)
    gap = None if bound is None else abs(bound - value) / max(abs(value), 1e-12)
    return Solution(
        slots=slots,
        value=value,
        bound=bound,
        gap=gap,
        seconds=time.perf_counter() - started,
        name="ilp",
        optimal=gap is not None and gap <= 1e-9,
        notes=tuple(notes),
    )


def _balance(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> tuple[Slots, float, list[str]]:
    """Every layer alone: slots, the bound on the mean busiest load, notes."""
    layers, bounds = [], []
    notes: list[str] = []
    deadline = time.perf_counter() + settings.time_limit_s
    for layer, loads in enumerate(problem.loads):
        left = max(0.05, (deadline - time.perf_counter()) / (problem.num_layers - layer))
        solved = balance_layer(loads, problem.slots_per_gpu, settings, left if not notes else 0.05)
        mean = loads.sum() / problem.num_gpus
        layers.append(solved.gpus)
        bounds.append(solved.bound / mean if mean else 1.0)
        progress(f"layer {layer + 1} of {problem.num_layers}: busiest {solved.busiest / mean if mean else 1.0:.4f}")
        if solved.interrupted:
            notes = ["interrupted: the layers left were solved without their integer program's full time"]
    filled = fill_spare_slots_for_balance(problem, sorted_slots(layers))
    return filled, min(float(np.mean(bounds)), problem.value(filled)), notes


def fill_spare_slots_for_balance(problem: PlacementProblem, slots: Slots) -> Slots:
    """Use slots that the programs left empty, as long as no layer's busiest load rises."""
    limits = np.array([busiest_load(loads, gpus) for loads, gpus in zip(problem.loads, slots, strict=True)])
    nothing = np.zeros_like(problem.transitions)
    return fill_spare_slots(slots, problem.slots_per_gpu, nothing, problem.loads, limits)


class _Locality:
    """One run of the locality objective."""

    def __init__(self, problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> None:
        self.problem = problem
        self.settings = settings
        self.progress = progress
        self.sizes = share_experts(problem.num_experts, problem.slots_per_gpu)
        self.total = max(1, int(problem.transitions.sum()))
        self.deadline = time.perf_counter() + settings.time_limit_s
        self.notes: list[str] = []

    def solve(self) -> tuple[Slots, float | None, list[str]]:
        """Slots, an upper bound on the value or None, notes."""
        problem = self.problem
        spare = sum(problem.slots_per_gpu) > problem.num_experts
        start = self._single_start(spare)
        if start is None:
            slots = self._search_copies()
            bound = None
        else:
            gpu, kept_at_most = self._search_single(start)
            slots = slots_from_gpu(gpu, problem.num_gpus)
            bound = kept_at_most / self.total if problem.transitions.any() else 1.0
        if spare:
            args = problem.transitions, problem.loads, problem.load_limits
            slots = fill_spare_slots(slots, problem.slots_per_gpu, *args)
            self.notes.append(NO_BOUND_WITH_COPIES)
            bound = None
        return slots, bound, self.notes

    def _single_start(self, spare: bool) -> NDArray[np.intp] | None:
        """One copy each within the load bound, [L, E]; None where only copies can keep it."""
        problem, limits = self.problem, self.problem.load_limits
        if limits is None:
            return np.tile(np.repeat(np.arange(problem.num_gpus), self.sizes), (problem.num_layers, 1))
        start = np.zeros(problem.loads.shape, dtype=np.intp)
        for layer, loads in enumerate(problem.loads):
            ones = np.ones(len(loads), dtype=np.int64)
            gpus = swap_copies(loads, pack_layer(loads, ones, self.sizes))
            if busiest_load(loads, gpus) > limits[layer]:
                limit = float(limits[layer])
                solved = balance_layer(loads, self.sizes, self.settings, self._time_left(), 1, enough=limit)
                gpus = solved.gpus
                if solved.busiest > limits[layer]:
                    if spare:
                        return None
                    self._refuse(layer, solved.busiest, solved.bound)
            for index, held in enumerate(gpus):
                start[layer, held] = index
        return start

    def _refuse(self, layer: int, busiest: float, bound: float) -> None:
        mean = self.problem.loads[layer].sum() / self.problem.num_gpus
        raise ProblemError(
            f"objective.max_load {self.problem.objective.max_load}: in MoE layer {layer} the least load found for the "
            f"busiest GPU is {busiest / mean:.6g} of the mean (no placement goes below {bound / mean:.6g}); give a "
            "higher max_load, more slots_per_gpu or fewer GPUs"
        )

    def _search_single(self, start: NDArray[np.intp]) -> tuple[NDArray[np.intp], int]:
        """One copy each: GPU of every expert [L, E], and a number of transitions that none exceeds."""
        problem = self.problem
        transitions, loads, limits = problem.transitions, problem.loads, problem.load_limits
        if not transitions.any():
            return start, 0
        if is_small(problem.num_layers, self.sizes):
            self.progress("exact dynamic program")
            gpu = best_chain(transitions, loads, self.sizes, limits)
            return gpu, self._kept(gpu)
        self.progress("annealing search")
        gpu, interrupted = self._anneal(single_copies(loads), start[None].repeat(CHAINS, axis=0), transitions)
        if limits is None:
            gpu = assignment_sweeps(transitions, gpu, self.sizes)
        self.progress(f"locality {self._kept(gpu) / self.total:.4f}; bounding it")
        bound = pair_bound(transitions, self.sizes)
        if not interrupted and is_tractable(problem.num_layers, problem.num_experts, problem.num_gpus):
            self.progress(
                f"locality {self._kept(gpu) / self.total:.4f}, bound {bound / self.total:.4f}; integer program"
            )
            found, program_bound, result = solve_locality_program(
                transitions, loads, self.sizes, limits, gpu, self.settings, self._time_left()
            )
            interrupted = result.interrupted
            bound = min(bound, program_bound if program_bound is not None else bound)
            if found is not None and self._kept(found) > self._kept(gpu) and self._is_valid(found):
                gpu = found
        if interrupted:
            self.notes.append("interrupted: this is the best placement found until then")
        return gpu, max(bound, self._kept(gpu))

    def _search_copies(self) -> Slots:
        """With the copies that the load bound needs: annealing over copies from a balanced placement."""
        problem, limits = self.problem, self.problem.load_limits
        assert limits is not None
        layers = []
        for layer, loads in enumerate(problem.loads):
            counts = copy_counts(loads, problem.slots_per_gpu)
            gpus = descend(loads, pack_layer(loads, counts, problem.slots_per_gpu))
            if busiest_load(loads, gpus) > limits[layer]:
                limit = float(limits[layer])
                solved = balance_layer(loads, problem.slots_per_gpu, self.settings, self._time_left(), enough=limit)
                gpus = solved.gpus
                if solved.busiest > limits[layer]:
                    self._refuse(layer, solved.busiest, solved.bound)
            layers.append(gpus)
        items, start, transitions = _copies_as_items(problem, layers)
        self.progress("annealing search over copies")
        gpu, interrupted = self._anneal(items, start[None].repeat(CHAINS, axis=0), transitions)
        if interrupted:
            self.notes.append("interrupted: this is the best placement found until then")
        placed: list[list[list[int]]] = [[[] for _ in problem.slots_per_gpu] for _ in layers]
        for layer in range(len(layers)):
            for expert, target in zip(items.expert[layer], gpu[layer], strict=True):
                if expert < problem.num_experts:
                    placed[layer][target].append(int(expert))
        return sorted_slots(placed)

    def _anneal(
        self, items: Items, starts: NDArray[np.intp], transitions: NDArray[np.integer]
    ) -> tuple[NDArray[np.intp], bool]:
        rng = np.random.default_rng(self.settings.seed)
        limits, rounds = self.problem.load_limits, self.settings.search_rounds
        return anneal(transitions, items, starts, self.problem.num_gpus, limits, rounds, rng)

    def _kept(self, gpu: NDArray[np.integer]) -> int:
        same = gpu[:-1, :, None] == gpu[1:, None, :]
        return int((self.problem.transitions * same).sum())

    def _is_valid(self, gpu: NDArray[np.intp]) -> bool:
        """Whether a program's answer keeps sizes and loads, which its tolerances might break."""
        sizes_kept = all(np.bincount(row, minlength=len(self.sizes)).tolist() == self.sizes for row in gpu)
        return sizes_kept and self.problem.within_load_bound(slots_from_gpu(gpu, self.problem.num_gpus))

    def _time_left(self) -> float:
        return max(0.1, self.deadline - time.perf_counter())


def _copies_as_items(
    problem: PlacementProblem, layers: list[list[list[int]]]
) -> tuple[Items, NDArray[np.intp], NDArray[np.int64]]:
    """Items and their GPUs for a placement with copies; empty slots become experts that nobody chooses.

    Returns:
        The items, their GPUs [L, M], and transitions [L-1, E', E'] with rows for the added experts.
    """
    num_slots = sum(problem.slots_per_gpu)
    padding = max(num_slots - sum(map(len, gpus)) for gpus in layers)
    num_experts = problem.num_experts + padding
    expert = np.zeros((problem.num_layers, num_slots), dtype=np.intp)
    gpu = np.zeros_like(expert)
    share = np.ones(expert.shape)
    load = np.zeros(expert.shape)
    for layer, gpus in enumerate(layers):
        unused = iter(range(problem.num_experts, num_experts))
        full = [
            held + [next(unused) for _ in range(slots - len(held))]
            for held, slots in zip(gpus, problem.slots_per_gpu, strict=True)
        ]
        expert[layer] = np.concatenate(full)
        gpu[layer] = np.repeat(np.arange(len(full)), problem.slots_per_gpu)
        share[layer] = (1.0 / np.bincount(expert[layer], minlength=num_experts).clip(1))[expert[layer]]
        load[layer] = np.pad(problem.loads[layer], (0, padding))[expert[layer]] * share[layer]
    return Items(expert, share, load), gpu, np.pad(problem.transitions, ((0, 0), (0, padding), (0, padding)))
