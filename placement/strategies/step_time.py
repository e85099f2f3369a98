"""The default strategy: the least expected step time of a declared workload, copies and placement together.

Layers are independent but for ``coherent``, where a token's home is its first choice of the layer before. So each layer
starts from the best of what the other strategies make, and is improved by local search on sampled steps under the
dispatch rule; in ``coherent`` the layers of one parity at a time, the others fixed.

Other objectives go to the strategy ``ilp``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from placement.errors import ProblemError
from placement.problem import Objective, PlacementProblem, Progress, Solution, SolverSettings
from placement.sampled_steps import Held, held_experts
from placement.slots import Slots, share_experts, sorted_slots
from placement.strategies import load_strategy
from placement.strategies.ilp import solve_ilp
from placement.strategies.layer_search import Deadline, LayerSearch
from placement.strategies.replan import choose_stages, find_stages

#: Passes over all layers; after each progress is told, and in ``coherent`` the neighbours are renewed.
PASSES = 8
#: Proposals per layer for each of ``solver.search_rounds``.
PROPOSALS_PER_ROUND = 4
#: The search ends after a pass that gains less than this share of the step time.
CONVERGED = 3e-4
#: Of the time limit, for each integer program and search that makes a start.
SHARE_PER_START = 0.1
#: Batch sizes from which on tokens, not active experts, may bound a step: balanced loads are worth starting from.
MANY_TOKENS = 64
#: Load bounds of the locality placements that the search may start from.
LOAD_BOUNDS = (None, 1.15)

#: A layer may take this many times its share of the time: layers differ, and no pass must starve the last ones.
SLACK = 4.0

INTERRUPTED = "interrupted: this is the best placement found until then"
CUT_SHORT = "the time limit ended the search: another run may find another plan"


def solve_step_time(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Solve for the problem's objective.

    Raises:
        ProblemError: the problem has no routes, no coefficients, or no solution.
    """
    if problem.objective.name != "step_time":
        return replace(solve_ilp(problem, settings, progress), name="step_time")
    return _StepTime(problem, settings, progress).solve()


class _StepTime:
    """One run of the objective ``step_time``."""

    def __init__(self, problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> None:
        self.started = time.perf_counter()
        self.problem = problem
        self.settings = settings
        self.progress = progress
        self.deadline = Deadline(settings.time_limit_s)
        self.steps = problem.sampled_steps
        self.bound = self.steps.lower_bound()
        self.notes: list[str] = []
        self.tasks_left = 0
        self.cut_short = False

    def solve(self) -> Solution:
        """The best placement found in the time given."""
        with ThreadPoolExecutor(self.settings.workers) as pool:
            if self.problem.running is not None and self.problem.max_moves is not None:
                held = self._replan(pool, self.problem.running, self.problem.max_moves)
            else:
                held = self._improve(pool, self._best_start())
        slots = sorted_slots([[np.flatnonzero(gpu).tolist() for gpu in held_EG.T] for held_EG in held])
        return Solution.of(self.problem, slots, "step_time", self.started, self.bound, self.notes)

    def _best_start(self) -> list[Held]:
        """The best placement of the other strategies: layer by layer, or as a whole where layers are chained."""
        best: list[Held] = []
        best_values = np.full(self.problem.num_layers, np.inf)
        try:
            for slots in self._starts():
                held = [held_experts(layer, self.problem.num_experts) for layer in slots]
                values = np.array([value.sum() for value in self.steps.layer_values(held)])
                if self.steps.chained:
                    better = np.full(len(values), values.sum() < best_values.sum())
                else:
                    better = values < best_values
                best = [new if b else old for b, new, old in zip(better, held, best or held, strict=True)]
                best_values = np.where(better, values, best_values)
                self._tell(float(best_values.sum()))
                if self.deadline.passed():
                    break
        except KeyboardInterrupt:
            self._interrupt()
        if not best:
            raise ProblemError("interrupted before there was any placement: run again")
        return best

    def _starts(self) -> Iterator[Slots]:
        """Placements to start from, the quickest first; the slower ones where the workload may want them.

        Strategies that ignore the objective are asked under ``balance``, whose value costs nothing to compute.
        With spare slots there are starts without copies, too: a copy that splits tokens makes one more GPU read the
        expert's weights, which large steps may not be worth.
        """
        problem = replace(self.problem, objective=Objective("balance"), max_moves=None)
        one_copy = tuple(share_experts(problem.num_experts, problem.slots_per_gpu))
        single = replace(problem, slots_per_gpu=one_copy, running=None)
        budgets = [problem] if one_copy == problem.slots_per_gpu else [problem, single]
        if problem.running is not None:
            yield problem.running
        for budget in budgets:
            yield self._other("eplb", budget)
        yield self._other("lina", problem)
        yield self._other("contiguous", problem)
        if problem.gpus_per_node < problem.num_gpus:
            yield self._other("eplb_hierarchical", problem)
        if max(problem.workload.batch_sizes) >= MANY_TOKENS:
            for budget in budgets:
                yield self._other("ilp", budget)
        if problem.workload.exchange != "allreduce" and problem.num_gpus > 1:
            for limit in LOAD_BOUNDS:
                try:
                    yield self._other("ilp", replace(problem, objective=Objective("locality", max_load=limit)))
                except ProblemError:
                    continue  # that load bound cannot be kept: nothing to start from
            if max(problem.workload.batch_sizes) >= MANY_TOKENS:
                yield self._other("moetuner", problem)

    def _other(self, strategy: str, problem: PlacementProblem) -> Slots:
        """What another strategy makes of a problem, in a part of the time."""
        brief = replace(self.settings, time_limit_s=max(0.05, SHARE_PER_START * self.settings.time_limit_s))
        found = load_strategy(strategy)(problem, brief, lambda line: None)
        if any(note.startswith("interrupted") for note in found.notes):
            self._interrupt()
        self.cut_short |= any("time limit" in note for note in found.notes)
        return found.slots

    def _improve(self, pool: ThreadPoolExecutor, held: list[Held]) -> list[Held]:
        """Local search over all layers, pass by pass."""
        num_layers = len(held)
        parities: list[Sequence[int]] = [range(num_layers)]
        if self.steps.chained:
            parities = [range(0, num_layers, 2), range(1, num_layers, 2)]
        self.tasks_left = PASSES * num_layers
        try:
            value = self._value(held)
            for number in range(PASSES):
                if self.deadline.passed():
                    break
                for layers in parities:
                    futures = [(layer, pool.submit(self._improve_layer, layer, list(held), number)) for layer in layers]
                    for layer, future in futures:
                        held[layer] = future.result()
                before, value = value, self._value(held)
                self._tell(value)
                if before - value < CONVERGED * value:
                    break
        except KeyboardInterrupt:
            self._interrupt()
        if (self.cut_short or self.deadline.passed()) and not self.deadline.told:
            self.notes.append(CUT_SHORT)
        return held

    def _improve_layer(self, layer: int, held: list[Held], number: int) -> Held:
        """One layer's part of a pass, ended where it takes much more than its share of the time that is left."""
        own = Deadline(SLACK * self.deadline.left() * self.settings.workers / self.tasks_left)
        self.tasks_left -= 1
        neighbours = self.steps.neighbours(layer, held)
        search = LayerSearch(self.steps, layer, held[layer], self.problem.slots_per_gpu, neighbours)
        rng = np.random.default_rng([self.settings.seed, layer, number])
        proposals = -(-self.settings.search_rounds * PROPOSALS_PER_ROUND // PASSES)
        search.run(proposals, rng, lambda: self.deadline.passed() or own.passed())
        self.cut_short |= own.passed()
        return search.held

    def _replan(self, pool: ThreadPoolExecutor, running: Slots, max_moves: int) -> list[Held]:
        """The best placement that moves at most so many copies from the running one."""
        held = [held_experts(layer, self.problem.num_experts) for layer in running]

        def start(layer: int) -> LayerSearch:
            neighbours = self.steps.neighbours(layer, held)
            return LayerSearch(self.steps, layer, held[layer], self.problem.slots_per_gpu, neighbours)

        stages, cut_short = find_stages(pool, start, held, max_moves, self.settings, self.deadline)
        if self.deadline.told:
            self.notes.append(INTERRUPTED)
        elif cut_short:
            self.notes.append(CUT_SHORT)
        if not self.steps.chained:
            return choose_stages(stages, max_moves)
        # Gains of adjacent layers do not add up where one is the other's home: those of one parity do.
        stay = [layer[:1] for layer in stages]
        choices = [stages, [s if n % 2 else stages[n] for n, s in enumerate(stay)]]
        choices += [[stages[n] if n % 2 else s for n, s in enumerate(stay)], stay]
        return min((choose_stages(choice, max_moves) for choice in choices), key=self._value)

    def _value(self, held: list[Held]) -> float:
        return float(sum(values.sum() for values in self.steps.layer_values(held)))

    def _interrupt(self) -> None:
        self.deadline.told = True
        self.notes.append(INTERRUPTED)

    def _tell(self, value: float) -> None:
        gap = abs(value - self.bound) / value
        self.progress(f"step time {value:.1f} µs, bound {self.bound:.1f} µs, gap {100 * gap:.1f}%")
