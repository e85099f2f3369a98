"""Polishing a placement layer by layer, and using its spare slots.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from placement.metrics import copy_weights
from placement.slots import Slots, sorted_slots


def assignment_sweeps(
    transitions: NDArray[np.number[Any]],
    gpu: NDArray[np.integer],
    sizes: Sequence[int],
    deadline: float = math.inf,
) -> NDArray[np.intp]:
    """Re-assign one layer after the other optimally against its neighbours, forwards and back, while that gains.

    Args:
        transitions: [L-1, E, E].
        gpu: [L, E], one copy each; loads are not bounded.
        sizes: experts on each GPU.
        deadline: on ``time.perf_counter()``; the sweep in progress is cut there.

    Returns:
        GPU of every expert, intp [L, E], at least as good.
    """
    placed: NDArray[np.intp] = np.array(gpu, dtype=np.intp)
    slot_gpu = np.repeat(np.arange(len(sizes)), sizes).astype(np.intp)
    order = [*range(len(placed)), *range(len(placed) - 2, 0, -1)]
    gained = True
    while gained:
        gained = False
        for layer in order:
            if time.perf_counter() >= deadline:
                return placed
            gains = layer_gains(transitions, np.eye(len(sizes))[placed], layer)
            experts, slots = linear_sum_assignment(gains[:, slot_gpu], maximize=True)
            better = slot_gpu[slots]
            if gains[experts, better].sum() > gains[experts, placed[layer]].sum() + 0.5:  # counts are whole numbers
                placed[layer] = better
                gained = True
    return placed


def greedy_chain(
    transitions: NDArray[np.number[Any]], sizes: Sequence[int], first: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """Assign one layer after the other optimally to the layer before: a first placement, intp [L, E].

    Args:
        transitions: [L-1, E, E].
        sizes: experts on each GPU; loads are not bounded.
        first: GPU of every expert of the first layer, intp [E]; None for the order of ids.
    """
    slot_gpu = np.repeat(np.arange(len(sizes)), sizes).astype(np.intp)
    placed = [slot_gpu if first is None else first]
    for counts in transitions:
        gains = counts.T @ np.eye(len(sizes))[placed[-1]]
        _, slots = linear_sum_assignment(gains[:, slot_gpu], maximize=True)
        placed.append(slot_gpu[slots])
    return np.stack(placed)


def layer_gains(transitions: NDArray[np.number[Any]], weights: NDArray[np.float64], layer: int) -> NDArray[np.float64]:
    """Transitions kept if an expert stood on a GPU, float64 [E, G], the other layers (weights [L, E, G]) given."""
    gains = np.zeros(weights.shape[1:])
    if layer > 0:
        gains += transitions[layer - 1].T @ weights[layer - 1]
    if layer < len(transitions):
        gains += transitions[layer] @ weights[layer + 1]
    return gains


def fill_spare_slots(
    slots: Slots,
    slots_per_gpu: Sequence[int],
    transitions: NDArray[np.integer],
    loads: NDArray[np.integer],
    load_limits: NDArray[np.float64] | None,
) -> Slots:
    """Give spare slots to copies: what raises locality most, or, where nothing does, the highest load per copy.

    Args:
        slots: a placement.
        slots_per_gpu: slots of each GPU in every layer.
        transitions, loads: [L-1, E, E], [L, E].
        load_limits: [L], the most load of a GPU, or None. A slot that no copy can take within it stays empty.
    """
    weights = copy_weights(slots, loads.shape[1]).swapaxes(1, 2)
    filled = []
    for layer, gpus in enumerate(slots):
        held = np.zeros((loads.shape[1], len(gpus)), dtype=bool)
        for gpu, experts in enumerate(gpus):
            held[list(experts), gpu] = True
        limit = np.inf if load_limits is None else float(load_limits[layer])
        gains = layer_gains(transitions, weights, layer)
        while (copy := _best_copy(held, gains, loads[layer], slots_per_gpu, limit)) is not None:
            held[copy] = True
        weights[layer] = held / held.sum(axis=1, keepdims=True)
        filled.append([np.flatnonzero(column).tolist() for column in held.T])
    return sorted_slots(filled)


def _best_copy(
    held: NDArray[np.bool_],
    gains: NDArray[np.float64],
    loads: NDArray[np.integer],
    slots_per_gpu: Sequence[int],
    limit: float,
) -> tuple[int, int] | None:
    """Expert and GPU of the copy to add to one layer (held [E, G]), or None."""
    copies = held.sum(axis=1)
    load = (held * (loads / copies)[:, None]).sum(axis=0)
    share = loads / (copies + 1)
    fits = ~held & (held.sum(axis=0) < slots_per_gpu) & (load[None, :] + share[:, None] <= limit)
    if not fits.any():
        return None
    now = (held * gains).sum(axis=1) / copies
    gained = np.where(fits, (gains - now[:, None]) / (copies + 1)[:, None], -np.inf)
    expert, gpu = np.unravel_index(int(np.argmax(gained)), gained.shape)
    if gained[expert, gpu] > 0:
        return int(expert), int(gpu)
    popular = int(np.argmax(np.where(fits.any(axis=1), loads / copies, -1.0)))
    return popular, int(np.argmin(np.where(fits[popular], load, np.inf)))
