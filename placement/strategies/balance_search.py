"""Local search for balance in one layer: swaps of copies, copies of other experts, and random kicks.

Shape suffixes: E experts, G GPUs, M copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def busiest_load(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> float:
    """The busiest GPU's load when copies share evenly."""
    copies = np.bincount([expert for held in gpus for expert in held], minlength=len(loads))
    return float(max(sum(loads[expert] / copies[expert] for expert in held) for held in gpus))


def search_balance(
    loads: NDArray[np.integer],
    gpus: Sequence[Sequence[int]],
    target: float,
    kicks: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Lower the busiest GPU's load by descents from randomly disturbed placements.

    Args:
        loads: int [E].
        gpus: experts on each GPU; the number of copies on each GPU is kept, the number of copies per expert is not.
        target: stop when the busiest load is at most this.
        kicks: descents.
        rng: source of the disturbances.
    """
    best = descend(loads, gpus)
    for _ in range(kicks):
        if busiest_load(loads, best) <= target:
            break
        candidate = descend(loads, _disturb(best, rng))
        if busiest_load(loads, candidate) < busiest_load(loads, best):
            best = candidate
    return best


def descend(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap copies, and turn copies of one expert into copies of another, as long as squared loads fall in sum."""
    current = swap_copies(loads, gpus)
    while (changed := _replace_copy(loads, current)) is not None:
        current = swap_copies(loads, changed)
    return current


def swap_copies(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap experts between GPUs as long as the sum of squared loads falls (steepest descent)."""
    expert = np.array([expert for held in gpus for expert in held])
    gpu = np.array([index for index, held in enumerate(gpus) for _ in held])
    weight = (loads / np.bincount(expert, minlength=len(loads)))[expert]
    holds = _holds(len(loads), gpus)
    load = np.bincount(gpu, weight, minlength=len(gpus))
    while True:
        shift = weight[:, None] - weight[None, :]
        change = 2 * shift * (shift - (load[gpu][:, None] - load[gpu][None, :]))
        present = holds[expert][:, gpu]  # [M, M]: the GPU of the second has the expert of the first
        change[present | present.T] = 0.0
        i, j = np.unravel_index(np.argmin(change), change.shape)
        if change[i, j] >= _negligible(load):
            return [expert[gpu == index].tolist() for index in range(len(gpus))]
        load[gpu[i]] -= shift[i, j]
        load[gpu[j]] += shift[i, j]
        holds[expert[i], gpu[i]] = holds[expert[j], gpu[j]] = False
        gpu[i], gpu[j] = gpu[j], gpu[i]
        holds[expert[i], gpu[i]] = holds[expert[j], gpu[j]] = True


def _replace_copy(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> list[list[int]] | None:
    """The best replacement of a spare copy by a copy of another expert, or None where none helps."""
    holds = _holds(len(loads), gpus)
    copies = holds.sum(axis=1)
    load = (holds * (loads / copies)[:, None]).sum(axis=0)
    spare, gpu = np.nonzero(holds & (copies > 1)[:, None])
    if not len(spare):
        return None
    fewer, more = loads / np.maximum(copies - 1, 1), loads / (copies + 1)
    without = load + holds[spare] * (fewer - loads / copies)[spare, None]  # [S, G] after a copy is gone
    without[np.arange(len(spare)), gpu] = load[gpu] - (loads / copies)[spare]
    relief = holds * (more - loads / copies)[:, None]  # [E, G] where another copy is added
    after = without[:, None, :] + relief[None]
    after[np.arange(len(spare)), :, gpu] += more
    squares = (after**2).sum(axis=2)
    squares[holds[:, gpu].T] = np.inf
    chosen, expert = np.unravel_index(np.argmin(squares), squares.shape)
    if squares[chosen, expert] - (load**2).sum() >= _negligible(load):
        return None
    replaced = [list(held) for held in gpus]
    held = replaced[gpu[chosen]]
    held[held.index(int(spare[chosen]))] = int(expert)
    return replaced


def _disturb(gpus: Sequence[Sequence[int]], rng: np.random.Generator) -> list[list[int]]:
    """Swap a few random experts between GPUs."""
    disturbed = [list(held) for held in gpus]
    occupied = [index for index, held in enumerate(disturbed) if held]
    for _ in range(3 if len(occupied) > 1 else 0):
        first, second = (disturbed[index] for index in rng.choice(occupied, size=2, replace=False))
        i, j = int(rng.integers(len(first))), int(rng.integers(len(second)))
        if first[i] not in second and second[j] not in first:
            first[i], second[j] = second[j], first[i]
    return disturbed


def _holds(num_experts: int, gpus: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    holds = np.zeros((num_experts, len(gpus)), dtype=bool)
    for index, held in enumerate(gpus):
        holds[list(held), index] = True
    return holds


def _negligible(load: NDArray[Any]) -> float:
    """A change of the sum of squares that is no more than rounding."""
    return -1e-9 * float((load**2).sum())
