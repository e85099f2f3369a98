"""ExFlow: fewest moves of tokens between GPUs from layer to layer, by integer programs over first choices.

Source: ExFlow (its placement program, and its two stages for several nodes). Here tokens are aggregated into counts of
transitions, which does not change the optimum. Where the whole program is too large, it is solved over two layers at a
time with the others fixed.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import share_experts, slots_from_gpu
from placement.strategies.locality_program import is_tractable, solve_locality_program
from placement.strategies.window_program import solve_window
from profiler.affinity_groups import assignment_sweeps, greedy_chain

#: Layer-by-layer assignments that are tried as a start, each from another first layer.
STARTS = 32
#: Share of the time for starts; more of them than fit into it are left out.
START_SHARE = 0.25
#: Windows of at most this many products of two placements are solved in seconds.
MOST_WINDOW_PRODUCTS = 8192
#: An integer program is not worth starting with less time.
LEAST_S = 0.05


def solve_exflow(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """Maximise the transitions of first choices that stay on a GPU, whatever the objective.

    One copy each, an equal share of the experts on each GPU (with uneven slots: in proportion); spare slots stay empty.
    On several nodes, moves between nodes are minimised first, then moves between the GPUs of each node.
    """
    problem.require_affinity("strategy exflow")
    started = time.perf_counter()
    search = _ExFlow(settings, progress, started + settings.time_limit_s)
    transitions = problem.statistics.top1_affinity
    sizes = share_experts(problem.num_experts, problem.slots_per_gpu)
    bound = None
    if problem.gpus_per_node == problem.num_gpus:
        gpu, kept_at_most = search.place(transitions, sizes, search.deadline)
        objective = problem.objective
        own_objective = objective.name == "locality" and objective.pairs == "top1" and objective.max_load is None
        if kept_at_most is not None and own_objective and list(problem.slots_per_gpu) == sizes:
            bound = kept_at_most / transitions.sum() if transitions.any() else 1.0
    else:
        gpu = search.place_nodes_first(transitions, sizes, problem.gpus_per_node)
    slots = slots_from_gpu(gpu, problem.num_gpus)
    return Solution.of(problem, slots, "exflow", started, bound, tuple(dict.fromkeys(search.notes)))


class _ExFlow:
    """One run: its time, its notes, and whether Ctrl-C was pressed."""

    def __init__(self, settings: SolverSettings, progress: Progress, deadline: float) -> None:
        self.settings = settings
        self.progress = progress
        self.deadline = deadline
        self.notes: list[str] = []
        self.interrupted = False

    def place_nodes_first(
        self, transitions: NDArray[np.integer], sizes: Sequence[int], gpus_per_node: int
    ) -> NDArray[np.intp]:
        """GPU of every expert, intp [L, E]: experts to nodes with half the time, then each node's to its GPUs."""
        starts = range(0, len(sizes), gpus_per_node)
        node_sizes = [sum(sizes[start : start + gpus_per_node]) for start in starts]
        node, _ = self.place(transitions, node_sizes, _in(0.5, self.deadline))
        gpu = np.zeros_like(node)
        for index, start in enumerate(starts):
            members = np.stack([np.flatnonzero(row == index) for row in node])
            counts = np.array(
                [c[a[:, None], b] for c, a, b in zip(transitions, members, members[1:], strict=False)], dtype=np.int64
            ).reshape(len(transitions), node_sizes[index], node_sizes[index])
            deadline = _in(1 / (len(node_sizes) - index), self.deadline)
            local, _ = self.place(counts, sizes[start : start + gpus_per_node], deadline)
            np.put_along_axis(gpu, members, start + local, axis=1)
        return gpu

    def place(
        self, transitions: NDArray[np.integer], sizes: Sequence[int], deadline: float
    ) -> tuple[NDArray[np.intp], int | None]:
        """GPU of every expert, intp [L, E]; and a number of transitions that no such placement exceeds, or None."""
        gpu = self._best_start(transitions, sizes, _in(START_SHARE, deadline))
        bound = None
        if _kept(transitions, gpu) == transitions.sum():
            return gpu, int(transitions.sum())
        if is_tractable(gpu.shape[0], gpu.shape[1], len(sizes)):
            self.progress(f"exflow: {_share_kept(transitions, gpu)} kept; whole program")
            gpu, bound = self._whole_program(transitions, sizes, gpu, _in(0.5, deadline))
            if bound == _kept(transitions, gpu):
                self.notes.append("the whole program was solved")
                return gpu, bound
            self.notes.append("the time limit ended the whole program; windows of two layers followed")
        else:
            self.notes.append("the whole program is too large; windows of two layers were solved")
        return self._improve_windows(transitions, sizes, gpu, deadline), bound

    def _best_start(self, transitions: NDArray[np.integer], sizes: Sequence[int], deadline: float) -> NDArray[np.intp]:
        """The best of several assignments layer by layer, each re-assigned one layer at a time until nothing gains."""
        rng = np.random.default_rng(self.settings.seed)
        slot_gpu = np.repeat(np.arange(len(sizes)), sizes).astype(np.intp)
        best = np.tile(slot_gpu, (len(transitions) + 1, 1))
        for index in range(STARTS if transitions.any() else 0):
            gpu = greedy_chain(transitions, sizes, rng.permutation(slot_gpu) if index else None)
            gpu = assignment_sweeps(transitions, gpu, sizes)
            if not index or _kept(transitions, gpu) > _kept(transitions, best):
                best = gpu
            if time.perf_counter() > deadline:
                if index + 1 < STARTS:
                    self.notes.append("the time limit left out some starts")
                break
        return best

    def _whole_program(
        self, transitions: NDArray[np.integer], sizes: Sequence[int], start: NDArray[np.intp], deadline: float
    ) -> tuple[NDArray[np.intp], int | None]:
        """All layers at once."""
        unused_loads = np.zeros(start.shape, dtype=np.int64)
        time_limit_s = max(LEAST_S, _left(deadline))
        found, bound, result = solve_locality_program(
            transitions, unused_loads, sizes, None, start, self.settings, time_limit_s
        )
        self._note_interrupt(result.interrupted)
        if found is not None and _kept(transitions, found) > _kept(transitions, start) and _keeps(found, sizes):
            start = found
        return start, None if bound is None else max(bound, _kept(transitions, start))

    def _improve_windows(
        self, transitions: NDArray[np.integer], sizes: Sequence[int], gpu: NDArray[np.intp], deadline: float
    ) -> NDArray[np.intp]:
        """Two adjacent layers at a time with the others fixed, forwards and back, until a pass gains nothing.

        Where a window of all GPUs is too large, each window takes some GPUs drawn at random and their experts.
        """
        gpu = gpu.copy()
        rng = np.random.default_rng(self.settings.seed)
        num_chosen = _gpus_per_window(sizes)
        order = [*range(len(transitions)), *range(len(transitions) - 2, -1, -1)]
        settled: set[int] = set()  # windows that are optimal as long as nothing around them changes
        gained = num_chosen > 1
        while gained:
            gained = False
            for index, layer in enumerate(order):
                if layer in settled:
                    continue
                if self.interrupted or _left(deadline) < LEAST_S:
                    self.notes.append("the windows were cut off before nothing more was gained")
                    return gpu
                chosen = np.sort(rng.choice(len(sizes), num_chosen, replace=False))
                limit_s = _left(deadline) / (len(order) - index)
                changed, optimal = self._solve_window(transitions, sizes, gpu, layer, chosen, limit_s)
                if changed:
                    gained = True
                    settled -= set(range(layer - 2, layer + 3))
                if not optimal:
                    self.notes.append("the time limit left some windows without proof")
                elif num_chosen == len(sizes):
                    settled.add(layer)
            self.progress(f"exflow: {_share_kept(transitions, gpu)} kept after a pass of windows")
        return gpu

    def _solve_window(
        self,
        transitions: NDArray[np.integer],
        sizes: Sequence[int],
        gpu: NDArray[np.intp],
        layer: int,
        chosen: NDArray[np.intp],
        time_limit_s: float,
    ) -> tuple[bool, bool]:
        """Re-assign the experts of the chosen GPUs in ``layer`` and the next, in place; changed, and optimal."""
        one_hot = np.eye(len(sizes))
        first, second = (np.flatnonzero(np.isin(gpu[at], chosen)) for at in (layer, layer + 1))
        gains = np.zeros((len(first), len(chosen))), np.zeros((len(second), len(chosen)))
        if layer > 0:
            gains[0][:] = (transitions[layer - 1].T @ one_hot[gpu[layer - 1]])[np.ix_(first, chosen)]
        if layer + 1 < len(transitions):
            gains[1][:] = (transitions[layer + 1] @ one_hot[gpu[layer + 2]])[np.ix_(second, chosen)]
        counts = transitions[layer][np.ix_(first, second)]
        start = np.searchsorted(chosen, gpu[layer, first]), np.searchsorted(chosen, gpu[layer + 1, second])
        window_sizes = [sizes[index] for index in chosen]
        found, optimal, interrupted = solve_window(counts, gains, window_sizes, start, self.settings, time_limit_s)
        self._note_interrupt(interrupted)
        if found is start:
            return False, optimal
        gpu[layer, first], gpu[layer + 1, second] = chosen[found[0]], chosen[found[1]]
        return True, optimal

    def _note_interrupt(self, interrupted: bool) -> None:
        if interrupted:
            self.interrupted = True
            self.notes.append("interrupted: this is the best placement found until then")


def _gpus_per_window(sizes: Sequence[int]) -> int:
    """How many GPUs a window takes; below 2 where even two have too many experts, or where there is one."""
    largest = np.sort(np.array(sizes))[::-1]
    products = np.cumsum(largest) ** 2 * np.arange(1, len(sizes) + 1)
    return int((products <= MOST_WINDOW_PRODUCTS).sum())


def _kept(transitions: NDArray[np.integer], gpu: NDArray[np.intp]) -> int:
    """Transitions that stay on a GPU."""
    return sum(int(c[a[:, None] == b[None, :]].sum()) for c, a, b in zip(transitions, gpu, gpu[1:], strict=False))


def _share_kept(transitions: NDArray[np.integer], gpu: NDArray[np.intp]) -> str:
    return f"{_kept(transitions, gpu) / max(1, int(transitions.sum())):.4f}"


def _keeps(gpu: NDArray[np.intp], sizes: Sequence[int]) -> bool:
    """Whether a program's answer has the right number of experts on every GPU, which its tolerances might break."""
    return all(np.bincount(row, minlength=len(sizes)).tolist() == list(sizes) for row in gpu)


def _left(deadline: float) -> float:
    return deadline - time.perf_counter()


def _in(share: float, deadline: float) -> float:
    """The moment after a share of the time left until a deadline."""
    return deadline - (1 - share) * _left(deadline)
