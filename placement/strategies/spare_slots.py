"""Using the spare slots of a placement.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.metrics import copy_weights
from placement.slots import Slots, sorted_slots
from profiler.affinity_groups import layer_gains


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
