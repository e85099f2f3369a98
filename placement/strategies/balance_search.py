"""Local search for balance in one layer: swaps of copies, copies of other experts, and random kicks.

Every descent lowers one smooth potential, the sum over GPUs and samples of (load / mean load) ** 16: with a single
sample it drives the busiest GPU down, with resampled loads the busiest GPU on other tokens.

Shape suffixes: E experts, G GPUs, M copies, R samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

#: Random swaps between two descents.
SWAPS_PER_KICK = 3
#: What a load above the limit, relative to the mean, adds to the potential per sample.
PENALTY = 1000.0
#: A relative change of the potential that is no more than rounding.
NEGLIGIBLE = 1e-9


def busiest_load(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> float:
    """The busiest GPU's load when copies share evenly."""
    copies = np.bincount([expert for held in gpus for expert in held], minlength=len(loads))
    return float(max(sum(loads[expert] / copies[expert] for expert in held) for held in gpus))


def tail_load(samples: NDArray[np.floating], gpus: Sequence[Sequence[int]]) -> float:
    """Mean of the busiest GPU's load over the worse half of the samples [R, E], when copies share evenly."""
    holds = _holds(samples.shape[1], gpus)
    busiest = np.sort((samples @ (holds / holds.sum(axis=1, keepdims=True))).max(axis=1))
    return float(busiest[len(busiest) // 2 :].mean())


def search_balance(
    loads: NDArray[np.integer],
    gpus: Sequence[Sequence[int]],
    target: float,
    kicks: int,
    rng: np.random.Generator,
    deadline: float = np.inf,
) -> list[list[int]]:
    """Lower the busiest GPU's load by descents from randomly disturbed placements.

    Args:
        loads: int [E].
        gpus: experts on each GPU; the number of copies on each GPU is kept, the number of copies per expert is not.
        target: stop when the busiest load is at most this.
        kicks: descents.
        rng: source of the disturbances.
        deadline: on ``time.perf_counter()``; the first descent is always made.
    """
    best = descend(loads, gpus)
    least = busiest_load(loads, best)
    for _ in range(kicks):
        if least <= target or time.perf_counter() > deadline:
            break
        candidate = descend(loads, _disturb(best, rng))
        if (busiest := busiest_load(loads, candidate)) < least:
            best, least = candidate, busiest
    return best


def harden(
    loads: NDArray[np.integer],
    samples: NDArray[np.floating],
    gpus: Sequence[Sequence[int]],
    limit: float,
    kicks: int,
    rng: np.random.Generator,
    deadline: float = np.inf,
) -> list[list[int]]:
    """Lower the busiest load that other tokens may have, holding that of the tokens solved on to a limit.

    Args:
        loads: int [E], of the tokens solved on.
        samples: float [R, E], loads that other tokens might have.
        gpus: experts on each GPU, with a busiest load of at most ``limit``; the copies on each GPU are kept in number.
        limit: on the busiest load, in the unit of ``loads``.
        kicks: descents.
        rng: source of the disturbances.
        deadline: on ``time.perf_counter()``.
    """
    rows = np.vstack([loads, samples])
    best = [list(held) for held in gpus]
    least = tail_load(samples, best)
    start: Sequence[Sequence[int]] = best
    for _ in range(kicks):
        if time.perf_counter() > deadline:
            break
        candidate = _descended(rows, start, limit, replace=True)
        expected = tail_load(samples, candidate)
        if expected < least and busiest_load(loads, candidate) <= limit:
            best, least = candidate, expected
        start = _disturb(best, rng)
    return best


def descend(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap copies, and turn copies of one expert into copies of another, as long as that lowers the potential."""
    return _descended(np.asarray(loads)[None], gpus, np.inf, replace=True)


def swap_copies(loads: NDArray[np.integer], gpus: Sequence[Sequence[int]]) -> list[list[int]]:
    """Swap experts between GPUs as long as that lowers the potential."""
    return _descended(np.asarray(loads)[None], gpus, np.inf, replace=False)


def _descended(rows: NDArray[Any], gpus: Sequence[Sequence[int]], limit: float, replace: bool) -> list[list[int]]:
    """The local optimum of the potential over rows [R, E], whose first row is held at ``limit``."""
    mean = rows.sum(axis=1, keepdims=True) / len(gpus)
    relative = np.divide(rows, mean, out=np.zeros(rows.shape), where=mean > 0)
    expert = np.array([expert for held in gpus for expert in held], dtype=np.int64)
    gpu = np.repeat(np.arange(len(gpus)), [len(held) for held in gpus])
    _descend_kernel(relative.T.copy(), expert, gpu, len(gpus), limit / mean[0, 0] if mean[0, 0] else np.inf, replace)
    return [expert[gpu == index].tolist() for index in range(len(gpus))]


def _disturb(gpus: Sequence[Sequence[int]], rng: np.random.Generator) -> list[list[int]]:
    """Swap a few random experts between GPUs."""
    disturbed = [list(held) for held in gpus]
    occupied = [index for index, held in enumerate(disturbed) if held]
    for _ in range(SWAPS_PER_KICK if len(occupied) > 1 else 0):
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


@njit(cache=True, nogil=True)
def _power(load: float) -> float:
    """``load`` ** 16."""
    squared = load * load
    fourth = squared * squared
    eighth = fourth * fourth
    return eighth * eighth


@njit(cache=True, nogil=True)
def _cost(load: float, sample: int, limit: float, penalty: float) -> float:
    """What a GPU's load in one sample adds to the potential; the first sample has the limit."""
    return _power(load) + (penalty * max(0.0, load - limit) if sample == 0 else 0.0)


@njit(cache=True, nogil=True)
def _try_swap(
    relative: NDArray[np.float64],
    expert: NDArray[np.int64],
    gpu: NDArray[np.int64],
    copies: NDArray[np.int64],
    holds: NDArray[np.bool_],
    load: NDArray[np.float64],
    limit: float,
    i: int,
    j: int,
) -> bool:
    """Swap two copies where that lowers the potential."""
    a, b, g, h = expert[i], expert[j], gpu[i], gpu[j]
    if g == h or a == b or holds[a, h] or holds[b, g]:
        return False
    num_samples = relative.shape[1]
    penalty = PENALTY * num_samples
    before, after = 0.0, 0.0
    for r in range(num_samples):
        shift = relative[a, r] / copies[a] - relative[b, r] / copies[b]
        before += _cost(load[g, r], r, limit, penalty) + _cost(load[h, r], r, limit, penalty)
        after += _cost(load[g, r] - shift, r, limit, penalty) + _cost(load[h, r] + shift, r, limit, penalty)
    if after >= before * (1.0 - NEGLIGIBLE):
        return False
    for r in range(num_samples):
        shift = relative[a, r] / copies[a] - relative[b, r] / copies[b]
        load[g, r] -= shift
        load[h, r] += shift
    holds[a, g], holds[b, h], holds[a, h], holds[b, g] = False, False, True, True
    expert[i], expert[j] = b, a
    return True


@njit(cache=True, nogil=True)
def _try_replace(
    relative: NDArray[np.float64],
    expert: NDArray[np.int64],
    gpu: NDArray[np.int64],
    copies: NDArray[np.int64],
    holds: NDArray[np.bool_],
    load: NDArray[np.float64],
    limit: float,
    i: int,
    b: int,
) -> bool:
    """Turn a copy of an expert that has others into a copy of expert ``b``, where that lowers the potential."""
    a, g = expert[i], gpu[i]
    if copies[a] == 1 or holds[b, g]:
        return False
    num_gpus, num_samples = load.shape
    penalty = PENALTY * num_samples
    # Load moves to the GPUs that keep a copy of a, and from those that have one of b; g loses a's share, and gets b's.
    to_a, to_b = 1.0 / (copies[a] * (copies[a] - 1.0)), -1.0 / (copies[b] * (copies[b] + 1.0))
    before, after = 0.0, 0.0
    for h in range(num_gpus):
        times_a, times_b = (to_a if holds[a, h] else 0.0), (to_b if holds[b, h] else 0.0)
        if h == g:
            times_a, times_b = -1.0 / copies[a], 1.0 / (copies[b] + 1.0)
        if times_a != 0.0 or times_b != 0.0:
            for r in range(num_samples):
                changed = load[h, r] + times_a * relative[a, r] + times_b * relative[b, r]
                before += _cost(load[h, r], r, limit, penalty)
                after += _cost(changed, r, limit, penalty)
    if after >= before * (1.0 - NEGLIGIBLE):
        return False
    for h in range(num_gpus):
        times_a, times_b = (to_a if holds[a, h] else 0.0), (to_b if holds[b, h] else 0.0)
        if h == g:
            times_a, times_b = -1.0 / copies[a], 1.0 / (copies[b] + 1.0)
        for r in range(num_samples):
            load[h, r] += times_a * relative[a, r] + times_b * relative[b, r]
    copies[a] -= 1
    copies[b] += 1
    holds[a, g], holds[b, g] = False, True
    expert[i] = b
    return True


@njit(cache=True, nogil=True)
def _descend_kernel(
    relative: NDArray[np.float64],
    expert: NDArray[np.int64],
    gpu: NDArray[np.int64],
    num_gpus: int,
    limit: float,
    replace: bool,
) -> None:
    """Improve a placement in place until no swap and no replacement of a copy lowers the potential.

    Args:
        relative: [E, R], loads relative to the mean GPU's.
        expert, gpu: [M], the copies; the GPU of an entry never changes.
        num_gpus: G.
        limit: on the first sample's load of every GPU.
        replace: whether copies may become copies of other experts.
    """
    num_experts, num_samples = relative.shape
    copies = np.zeros(num_experts, dtype=np.int64)
    holds = np.zeros((num_experts, num_gpus), dtype=np.bool_)
    for i in range(len(expert)):
        copies[expert[i]] += 1
        holds[expert[i], gpu[i]] = True
    load = np.zeros((num_gpus, num_samples))
    for i in range(len(expert)):
        for r in range(num_samples):
            load[gpu[i], r] += relative[expert[i], r] / copies[expert[i]]
    improved = True
    while improved:
        improved = False
        for i in range(len(expert)):
            for j in range(i + 1, len(expert)):
                if _try_swap(relative, expert, gpu, copies, holds, load, limit, i, j):
                    improved = True
        if improved or not replace:
            continue
        for i in range(len(expert)):
            for b in range(num_experts):
                if _try_replace(relative, expert, gpu, copies, holds, load, limit, i, b):
                    improved = True
