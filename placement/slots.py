"""Slots: the logical experts that each GPU holds in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from placement.errors import PlanError

#: ``slots[layer][gpu]`` lists logical expert ids.
Slots = tuple[tuple[tuple[int, ...], ...], ...]


def copies_of_layer(layer_slots: Sequence[Sequence[int]], num_experts: int) -> NDArray[np.int32]:
    """GPUs of each expert's copies, from one layer's slots: int32 [E, C], ascending, padded with -1."""
    holders: list[list[int]] = [[] for _ in range(num_experts)]
    for gpu, experts in enumerate(layer_slots):
        for expert in experts:
            holders[expert].append(gpu)
    copies = np.full((num_experts, max(map(len, holders))), -1, dtype=np.int32)
    for expert, gpus in enumerate(holders):
        copies[expert, : len(gpus)] = gpus
    return copies


def check_slots(slots: Slots, num_experts: int, layer_ids: Sequence[int]) -> None:
    """Refuse slots that miss an expert, repeat one on a GPU, or do not fit the layers.

    Raises:
        PlanError: naming the layer, the GPU and the expert.
    """
    if len(slots) != len(layer_ids):
        raise PlanError(f"slots has {len(slots)} layers, layer_ids has {len(layer_ids)}: expected the same number")
    if not slots[0]:
        raise PlanError("slots lists no GPU: expected one list of experts per GPU in every layer")
    for layer_id, layer in zip(layer_ids, slots, strict=True):
        if len(layer) != len(slots[0]):
            raise PlanError(
                f"layer {layer_id} lists {len(layer)} GPUs, the first layer {len(slots[0])}: expected equal"
            )
        for gpu, experts in enumerate(layer):
            bad = [expert for expert in experts if not is_int(expert) or not 0 <= expert < num_experts]
            if bad:
                raise PlanError(f"layer {layer_id}, GPU {gpu}: expert {bad[0]!r}, expected 0 to {num_experts - 1}")
            if len(set(experts)) < len(experts):
                twice = next(expert for expert in experts if experts.count(expert) > 1)
                raise PlanError(f"layer {layer_id}: expert {twice} is on GPU {gpu} twice; copies need different GPUs")
        missing = set(range(num_experts)).difference(*layer)
        if missing:
            raise PlanError(f"layer {layer_id}: expert {min(missing)} is on no GPU; every expert needs a slot")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value read from JSON or YAML is an integer (booleans are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def sorted_slots(layers: Sequence[Sequence[Sequence[int] | NDArray[np.integer]]]) -> Slots:
    """The same slots as nested tuples of Python integers, ascending on each GPU."""
    return tuple(tuple(tuple(sorted(int(expert) for expert in gpu)) for gpu in layer) for layer in layers)


def slots_from_gpu(gpu_of_expert: NDArray[np.integer], num_gpus: int) -> Slots:
    """Slots with one copy each, from the GPU of every expert: int [L, E]."""
    return sorted_slots([[np.flatnonzero(row == gpu).tolist() for gpu in range(num_gpus)] for row in gpu_of_expert])


def share_experts(num_experts: int, slots_per_gpu: Sequence[int]) -> list[int]:
    """How many experts each GPU holds when every expert has one copy: in proportion to its slots.

    Args:
        num_experts: E.
        slots_per_gpu: slots of each GPU and layer, in all at least E.

    Returns:
        One count per GPU, each at most that GPU's slots; their sum is E.
    """
    total = sum(slots_per_gpu)
    ends = [num_experts * sum(slots_per_gpu[: gpu + 1]) // total for gpu in range(len(slots_per_gpu))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def even_slots(num_experts: int, num_gpus: int) -> list[int]:
    """Slots per GPU for exactly one copy of each expert; the first GPUs take one more where E is no multiple of G."""
    return [num_experts // num_gpus + (gpu < num_experts % num_gpus) for gpu in range(num_gpus)]
