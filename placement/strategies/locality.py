"""Locality: most transitions between adjacent layers stay on a GPU, the busiest GPU's load bounded on request.

The bound holds for every placement with these slots, copies that share evenly included.
"""

from __future__ import annotations

import time

import numpy as np

from placement.errors import ProblemError
from placement.problem import PlacementProblem, Progress, SolverSettings
from placement.slots import Slots, share_experts
from placement.strategies.chain_program import best_chain, is_small
from placement.strategies.chain_search import Budget, Labels, search_chain
from placement.strategies.locality_bound import pair_bound
from placement.strategies.locality_program import is_tractable, solve_locality_program
from placement.strategies.locality_start import Items, first_items
from placement.strategies.nearest_copies import add_nearest_copies
from placement.strategies.node_search import node_locality, search_nodes_first

EMPTY_SLOTS = (
    "spare slots that the load bound does not need stay empty: copies chosen by rule level cannot raise locality"
)
#: Share of the time that the search may take; bounding follows.
SEARCH_SHARE = 0.85


def solve_locality(
    problem: PlacementProblem, settings: SolverSettings, progress: Progress
) -> tuple[Slots, float | None, list[str]]:
    """Slots, an upper bound on the value or None, notes.

    Raises:
        ProblemError: the load bound cannot be kept; the message gives the least that can.
    """
    return _Locality(problem, settings, progress).solve()


class _Locality:
    """One run of the locality objective."""

    def __init__(self, problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> None:
        self.problem = problem
        self.settings = settings
        self.progress = progress
        self.total = max(1, int(problem.transitions.sum()))
        self.started = time.perf_counter()
        self.deadline = self.started + settings.time_limit_s
        self.notes: list[str] = []

    def solve(self) -> tuple[Slots, float | None, list[str]]:
        """Slots, an upper bound on the value or None, notes."""
        problem = self.problem
        spare = sum(problem.slots_per_gpu) > problem.num_experts
        if spare and problem.dispatch.rule == "nearest" and problem.workload.exchange == "coherent":
            return self._solve_nearest(), None, self.notes
        sizes = problem.slots_per_gpu if spare else self._one_each()
        slots, at_most = self._search(first_items(problem, sizes, self.settings, self._time_left()), self.deadline)
        if spare:
            self.notes.append(EMPTY_SLOTS)
        if problem.gpus_per_node < problem.num_gpus:
            nodes, gpus = node_locality(problem, slots), problem.value(slots)
            self.notes.append(f"{nodes:.4f} of transitions stay within their node, {gpus:.4f} on their GPU")
        bound, value = at_most / self.total, problem.value(slots)
        assert bound >= value - 1e-6, (bound, value)
        return slots, max(bound, value), self.notes  # equal but for rounding where it was below

    def _one_each(self) -> list[int]:
        """Slots of each GPU that one copy of each expert needs, shared evenly."""
        return share_experts(self.problem.num_experts, self.problem.slots_per_gpu)

    def _solve_nearest(self) -> Slots:
        """Copies added to two placements without: one that uses slots evenly, one that uses them as locality wants."""
        problem = self.problem
        if problem.routes is None:
            raise ProblemError("dispatch.rule nearest with spare slots needs tokens, not counts alone: give a trace")
        found = []
        for sizes, share in ((self._one_each(), 0.4), (list(problem.slots_per_gpu), 0.8)):
            until = self.started + share * self.settings.time_limit_s
            try:
                items = first_items(problem, sizes, self.settings, self._time_left())
            except ProblemError:
                if sizes == list(problem.slots_per_gpu):
                    raise
                continue  # one copy each cannot keep the load bound
            slots, _ = self._search(items, until, bounded=False)
            found.append(add_nearest_copies(problem, slots, self.deadline))
            self.progress(f"locality under rule nearest {found[-1][1]:.4f}")
        slots, value = max(found, key=lambda pair: pair[1])
        self.notes.append(
            f"under dispatch rule nearest {value:.4f} of transitions stay on their GPU; no bound is known"
        )
        return slots

    def _search(self, items: Items, until: float, bounded: bool = True) -> tuple[Slots, float]:
        """Slots, and a number of transitions that no placement keeps more than (all of them where not asked for)."""
        problem, chain = self.problem, items.chain
        if not problem.transitions.any():
            return items.slots(items.start), self.total
        if not items.has_copies and is_small(problem.num_layers, chain.sizes):
            self.progress("exact dynamic program")
            gpu = best_chain(chain.transitions, chain.loads, chain.sizes, problem.load_limits)
            if problem.load_limits is None or chain.loads.shape[1] == problem.num_experts:
                return items.slots(gpu), round(chain.kept(gpu))
            # Copies may keep a load bound, and with it more transitions, where one each does not.
            return items.slots(gpu), pair_bound(problem.transitions, problem.slots_per_gpu, until)
        gpu, ended = self._anneal(items, until)
        if ended is not None and ended not in self.notes:
            self.notes.append(ended)
        if not bounded:
            return items.slots(gpu), self.total
        value = chain.kept(gpu) / self.total
        self.progress(f"locality {value:.4f}; bounding it")
        bound = float(pair_bound(problem.transitions, problem.slots_per_gpu, until))
        gap = bound / self.total / max(value, 1e-12) - 1
        self.progress(f"locality {value:.4f}, bound {bound / self.total:.4f}, gap {gap:.1%}")
        no_spare = chain.loads.shape[1] == problem.num_experts
        if ended is None and no_spare and is_tractable(problem.num_layers, problem.num_experts, problem.num_gpus):
            gpu, bound = self._program(items, gpu, bound)
        return items.slots(gpu), bound

    def _anneal(self, items: Items, until: float) -> tuple[Labels, str | None]:
        """Search all GPUs at once, or nodes first."""

        def found(kept: float) -> None:
            self.progress(f"locality {kept / self.total:.4f}")

        settings = self.settings
        budget = Budget(settings.search_rounds, settings.seed, settings.workers, until).until(SEARCH_SHARE)
        if self.problem.gpus_per_node < self.problem.num_gpus:
            if not items.has_copies:
                return search_nodes_first(items, self.problem.gpus_per_node, budget, found)
            self.notes.append("the load bound needs copies: GPUs were searched regardless of their nodes")
        return search_chain(items.chain, items.start, budget, found)

    def _program(self, items: Items, gpu: Labels, bound: float) -> tuple[Labels, float]:
        """The integer program from a placement with one copy each; the better of both, and the lower bound."""
        self.progress("integer program")
        problem, chain = self.problem, items.chain
        by_expert = np.take_along_axis(gpu, items.expert.argsort(axis=1), axis=1)
        args = problem.transitions, problem.loads, chain.sizes, problem.load_limits, by_expert
        found, program_bound, result = solve_locality_program(*args, self.settings, self._time_left())
        if result.interrupted:
            self.notes.append("interrupted: this is the best placement found until then")
        if program_bound is not None:
            bound = min(bound, program_bound)
        if found is not None:
            candidate = np.take_along_axis(found, items.expert, axis=1)
            sizes_kept = all(
                np.bincount(row, minlength=len(chain.sizes)).tolist() == list(chain.sizes) for row in found
            )
            if sizes_kept and chain.fits(candidate).all() and chain.kept(candidate) > chain.kept(gpu):
                gpu = candidate
        if bound > chain.kept(gpu) and not result.interrupted:
            self.notes.append("the time limit ended the integer program: the optimum is not proven")
        return gpu, bound

    def _time_left(self) -> float:
        return max(0.1, self.deadline - time.perf_counter())
