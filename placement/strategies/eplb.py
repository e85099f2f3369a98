"""EPLB: greedy copies for the busiest experts, then greedy packing, to balance token counts.

Source: DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB), its global and its hierarchical
policy, written anew from its description. Unlike it, an expert never stands twice on one GPU, and GPUs may have
different numbers of slots.

Shape suffixes: L layers, E experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from placement.problem import PlacementProblem, Progress, Solution, SolverSettings
from placement.slots import Slots, share_experts, sorted_slots


def solve_eplb(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """EPLB's global policy on the popularity of the tokens solved on, whatever the objective and the topology."""
    started = time.perf_counter()
    slots = eplb_slots(problem.statistics.popularity, problem.slots_per_gpu)
    return Solution.of(problem, slots, "eplb", started)


def solve_eplb_hierarchical(problem: PlacementProblem, settings: SolverSettings, progress: Progress) -> Solution:
    """EPLB's hierarchical policy on the popularity of the tokens solved on; on one node it equals ``solve_eplb``."""
    started = time.perf_counter()
    slots = hierarchical_eplb_slots(problem.statistics.popularity, problem.slots_per_gpu, problem.gpus_per_node)
    return Solution.of(problem, slots, "eplb_hierarchical", started)


def eplb_slots(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> Slots:
    """Slots that balance expected loads, greedily.

    Args:
        loads: [L, E], token–expert pairs.
        slots_per_gpu: slots of each GPU in every layer, in all at least E.

    Returns:
        Slots that use every slot, as long as no expert has a copy on every GPU already and uneven slot counts allow it.
    """
    return sorted_slots([pack_layer(row, copy_counts(row, slots_per_gpu), slots_per_gpu) for row in loads])


def hierarchical_eplb_slots(loads: NDArray[np.integer], slots_per_gpu: Sequence[int], gpus_per_node: int) -> Slots:
    """Slots that balance expected loads over nodes first; all copies of an expert stand within one node.

    Every expert is an expert group of its own, so that the policy needs no number of groups that nodes divide.

    Args:
        loads: [L, E], token–expert pairs.
        slots_per_gpu: slots of each GPU in every layer, in all at least E.
        gpus_per_node: GPUs of a node; the number of GPUs is a multiple of it.

    Returns:
        Slots; a node holds different experts in proportion to its slots.
    """
    nodes = [slots_per_gpu[start : start + gpus_per_node] for start in range(0, len(slots_per_gpu), gpus_per_node)]
    sizes = share_experts(loads.shape[1], [sum(slots) for slots in nodes])
    layers = []
    for row in loads:
        gpus: list[list[int]] = []
        for held, slots in zip(pack_layer(row, np.ones_like(row), sizes), nodes, strict=True):
            experts = np.sort(np.array(held, dtype=np.intp))
            packed = pack_layer(row[experts], copy_counts(row[experts], slots), slots)
            gpus.extend([int(experts[index]) for index in local] for local in packed)
        layers.append(gpus)
    return sorted_slots(layers)


def copy_counts(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> NDArray[np.int64]:
    """Copies per expert, int64 [E]: a spare slot goes to the highest load per copy (ties: lower id)."""
    num_gpus = sum(1 for slots in slots_per_gpu if slots)
    counts = [1] * len(loads)
    load = np.asarray(loads, dtype=np.float64).tolist()
    heap = [(-value, expert) for expert, value in enumerate(load)] if num_gpus > 1 else []
    heapify(heap)
    for _ in range(sum(slots_per_gpu) - len(loads)):
        if not heap:
            break  # every expert has a copy on every GPU
        _, expert = heappop(heap)
        counts[expert] += 1
        if counts[expert] < num_gpus:
            heappush(heap, (-load[expert] / counts[expert], expert))
    return np.array(counts, dtype=np.int64)


def pack_layer(
    loads: NDArray[np.integer], counts: NDArray[np.integer], slots_per_gpu: Sequence[int]
) -> list[list[int]]:
    """Pack copies into GPUs, heaviest first, each on the least loaded GPU with a free slot that lacks the expert.

    Args:
        loads: [E], token–expert pairs.
        counts: [E], copies of each expert, at least 1 each and in all no more than there are slots.
        slots_per_gpu: slots of each GPU.

    Returns:
        Experts of each GPU. With uneven slots a copy that no GPU can take is left out, never an expert's only one.
    """
    weight = np.asarray(loads) / counts
    weights, copies = weight.tolist(), counts.tolist()
    gpus: list[list[int]] = [[] for _ in slots_per_gpu]
    filled = [0.0] * len(gpus)
    free = [(0.0, gpu) for gpu, slots in enumerate(slots_per_gpu) if slots]  # a heap: least loaded first, then lower id
    for expert in np.argsort(-weight, kind="stable").tolist():
        taken: list[int] = []
        for _ in range(copies[expert]):
            if free:
                target = heappop(free)[1]
            else:  # all GPUs with a free slot have taken this expert
                room = [gpu for gpu in sorted(taken) if len(gpus[gpu]) < slots_per_gpu[gpu]]
                target = make_room(expert, room, gpus, filled, weight)
                if target < 0:
                    break  # uneven slots: no GPU can take another copy of this expert
            taken.append(target)
            gpus[target].append(expert)
            filled[target] += weights[expert]
        for gpu in taken:
            if len(gpus[gpu]) < slots_per_gpu[gpu]:
                heappush(free, (filled[gpu], gpu))
    return gpus


def make_room(
    expert: int, free: Sequence[int], gpus: list[list[int]], filled: list[float], weight: NDArray[np.float64]
) -> int:
    """Move an expert from a full GPU that lacks ``expert`` to one with a free slot.

    Args:
        expert: the expert to make room for.
        free: GPUs with a free slot; all hold the expert.
        gpus: experts of each GPU, changed in place.
        filled: load of each GPU, changed in place.
        weight: float64 [E], load per copy.

    Returns:
        The GPU with room now, or -1 where there is none.
    """
    for source, held in enumerate(gpus):
        if expert in held:
            continue
        for target in free:
            movable = [other for other in held if other not in gpus[target]]
            if movable:
                lightest = movable[-1]
                held.remove(lightest)
                gpus[target].append(lightest)
                filled[source] -= weight[lightest]
                filled[target] += weight[lightest]
                return source
    return -1
