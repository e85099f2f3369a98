"""EPLB: greedy copies for the busiest experts, then greedy packing, to balance token counts.

Source: DeepSeek's expert-parallelism load balancer (github.com/deepseek-ai/EPLB), its global policy, written anew from
its description. Unlike it, an expert never stands twice on one GPU, and GPUs may have different numbers of slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.slots import Slots, sorted_slots


def eplb_slots(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> Slots:
    """Slots that balance expected loads, greedily.

    Args:
        loads: [L, E], token–expert pairs.
        slots_per_gpu: slots of each GPU in every layer, in all at least E.

    Returns:
        Slots that use every slot, as long as no expert has a copy on every GPU already and uneven slot counts allow it.
    """
    return sorted_slots([pack_layer(row, copy_counts(row, slots_per_gpu), slots_per_gpu) for row in loads])


def copy_counts(loads: NDArray[np.integer], slots_per_gpu: Sequence[int]) -> NDArray[np.int64]:
    """Copies per expert, int64 [E]: a spare slot goes to the highest load per copy (ties: lower id)."""
    num_gpus = sum(1 for slots in slots_per_gpu if slots)
    counts = np.ones(len(loads), dtype=np.int64)
    for _ in range(min(sum(slots_per_gpu), num_gpus * len(loads)) - len(loads)):
        per_copy = np.where(counts < num_gpus, loads / counts, -1.0)
        counts[np.argmax(per_copy)] += 1
    return counts


def pack_layer(
    loads: NDArray[np.integer], counts: NDArray[np.integer], slots_per_gpu: Sequence[int]
) -> list[list[int]]:
    """Pack copies into GPUs, heaviest first, each on the least loaded GPU with a free slot that lacks the expert."""
    weight = np.asarray(loads) / counts
    gpus: list[list[int]] = [[] for _ in slots_per_gpu]
    filled = [0.0] * len(gpus)
    for expert in np.argsort(-weight, kind="stable").tolist():
        for _ in range(counts[expert]):
            free = [gpu for gpu, held in enumerate(gpus) if len(held) < slots_per_gpu[gpu]]
            open_gpus = [gpu for gpu in free if expert not in gpus[gpu]]
            if open_gpus:
                target = min(open_gpus, key=lambda gpu: (filled[gpu], gpu))
            else:
                target = _make_room(expert, free, gpus, filled, weight)
                if target < 0:
                    break  # uneven slots: no GPU can take another copy of this expert
            gpus[target].append(expert)
            filled[target] += weight[expert]
    return gpus


def _make_room(
    expert: int, free: list[int], gpus: list[list[int]], filled: list[float], weight: NDArray[np.float64]
) -> int:
    """Move an expert from a full GPU that lacks ``expert`` to one with a free slot; the GPU with room now, or -1."""
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
