"""Experts that follow one another, grouped: one group of each layer to a GPU, layer by layer, by exact assignment.

With the layers around it fixed, the best placement of one layer is an assignment problem. Sweeping over the layers is
quick and finds most of the locality there is; ``placement`` starts its search here, and the profile shows how
much locality a trace offers.

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
