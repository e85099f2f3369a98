"""Copies for locality under the dispatch rule ``nearest``: a copy where a token already is keeps its next choice there.

A token's home is the GPU that served its first choice in the layer before (exchange ``coherent``). A choice whose
expert has a copy at home is served there; the others are taken to be spread evenly over the expert's copies.

Shape suffixes: T tokens, L layers, K choices, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.problem import PlacementProblem
from placement.slots import Slots, sorted_slots

#: Passes over the layers; later ones know where the next layer's choices are served.
PASSES = 4

Served = NDArray[np.int16]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def add_nearest_copies(problem: PlacementProblem, slots: Slots, deadline: float) -> tuple[Slots, float]:
    """Fill spare slots with the copies that keep most of the tokens' transitions on their GPU.

    Args:
        problem: with routes; its objective says which transitions count, its load bound is kept.
        slots: one copy each (or more), within the load bound.
        deadline: on ``time.perf_counter()``; no further pass begins after it.

    Returns:
        Slots, and the locality of the tokens solved on, replayed by the rule.
    """
    assert problem.routes is not None, "copies for nearest are chosen from tokens"
    top_k = problem.routes.shape[2] if problem.objective.pairs == "all" else 1
    routes_LTK = np.ascontiguousarray(problem.routes[:, :, :top_k].swapaxes(0, 1)).astype(np.intp)
    holds_LEG = _holds(slots, problem.num_experts)
    base_LEG = holds_LEG.copy()
    best, best_value = slots, nearest_locality(routes_LTK, holds_LEG)
    for _ in range(PASSES):
        homes_T = np.arange(routes_LTK.shape[1]) % problem.num_gpus
        served_TK: Served | None = None
        for layer in range(len(routes_LTK)):
            kept_EGG = _kept_if_served(routes_LTK, holds_LEG, layer, homes_T, served_TK)
            holds_LEG[layer] = _fill(problem, layer, base_LEG[layer], kept_EGG)
            served_TK = _serve(routes_LTK[layer], holds_LEG[layer], homes_T)
            homes_T = served_TK[:, 0]
        value = nearest_locality(routes_LTK, holds_LEG)
        if value > best_value:
            best, best_value = _slots(holds_LEG), value
        if time.perf_counter() >= deadline:
            break
    return best, best_value


def nearest_locality(routes_LTK: NDArray[np.intp], holds_LEG: Mask) -> float:
    """Share of transitions that stay on a GPU by the rule ``nearest``, exchange ``coherent``."""
    num_layers, num_tokens, top_k = routes_LTK.shape
    if num_layers < 2:
        return 1.0
    homes_T = np.arange(num_tokens) % holds_LEG.shape[2]
    before_TK: Served | None = None
    kept = 0
    for experts_TK, holds_EG in zip(routes_LTK, holds_LEG, strict=True):
        served_TK = _serve(experts_TK, holds_EG, homes_T)
        if before_TK is not None:
            kept += int((before_TK[:, :, None] == served_TK[:, None, :]).sum())
        before_TK, homes_T = served_TK, served_TK[:, 0]
    return kept / (num_tokens * (num_layers - 1) * top_k**2)


def _serve(experts_TK: NDArray[np.intp], holds_EG: Mask, homes_T: NDArray[np.integer]) -> Served:
    """GPU of every choice: home where it has a copy, else the copies in turn."""
    at_home_TK = holds_EG[experts_TK, homes_T[:, None]]
    copies_E = holds_EG.sum(axis=1)
    order_EG = np.argsort(~holds_EG, axis=1, kind="stable")  # holders first
    turn_TK = np.arange(len(experts_TK))[:, None] // holds_EG.shape[1] % copies_E[experts_TK]
    served: Served = np.where(at_home_TK, homes_T[:, None], order_EG[experts_TK, turn_TK]).astype(np.int16)
    return served


def _kept_if_served(
    routes_LTK: NDArray[np.intp],
    holds_LEG: Mask,
    layer: int,
    homes_T: NDArray[np.integer],
    before_TK: Served | None,
) -> Array:
    """Transitions kept by an expert's tokens of each home if served on each GPU, [E, home, GPU]."""
    _, num_experts, num_gpus = holds_LEG.shape
    experts_TK = routes_LTK[layer]
    num_tokens, top_k = experts_TK.shape
    kept_TG = np.zeros((num_tokens, num_gpus))
    if before_TK is not None:
        kept_TG += _choices_on(before_TK, num_gpus)
    first_TG = kept_TG
    if layer + 1 < len(routes_LTK):
        # The first choice's GPU becomes home: there all choices with a copy are served. The others stay where they are.
        homes_next_T = _serve(experts_TK, holds_LEG[layer], homes_T)[:, 0]
        next_TK = _serve(routes_LTK[layer + 1], holds_LEG[layer + 1], homes_next_T)
        first_TG = kept_TG + holds_LEG[layer + 1][routes_LTK[layer + 1]].sum(axis=1)
        kept_TG = kept_TG + _choices_on(next_TK, num_gpus)
    kept_EGG = np.empty((num_experts * num_gpus, num_gpus))
    keys_TK = experts_TK * num_gpus + homes_T[:, None]
    for gpu in range(num_gpus):
        weights_TK = np.repeat(kept_TG[:, gpu, None], top_k, axis=1)
        weights_TK[:, 0] = first_TG[:, gpu]
        kept_EGG[:, gpu] = np.bincount(keys_TK.ravel(), weights_TK.ravel(), num_experts * num_gpus)
    return kept_EGG.reshape(num_experts, num_gpus, num_gpus)


def _choices_on(served_TK: Served, num_gpus: int) -> Array:
    """A token's choices served on each GPU, [T, G]."""
    keys = np.arange(len(served_TK))[:, None] * num_gpus + served_TK
    return np.bincount(keys.ravel(), minlength=len(served_TK) * num_gpus).reshape(-1, num_gpus).astype(np.float64)


def _fill(problem: PlacementProblem, layer: int, base_EG: Mask, kept_EGG: Array) -> Mask:
    """Add the copy that keeps most more, within slots and load limit, until none does."""
    holds_EG = base_EG.copy()
    loads = problem.loads[layer].astype(np.float64)
    limit = np.inf if problem.load_limits is None else float(problem.load_limits[layer])
    at_home_EG = np.einsum("egg->eg", kept_EGG)
    while True:
        copies_E = holds_EG.sum(axis=1)
        now_E = _kept(holds_EG[:, None, :], at_home_EG, kept_EGG)[:, 0]
        gpus = np.arange(holds_EG.shape[1])
        more_EGG = holds_EG[:, None, :] | (gpus[:, None] == gpus[None, :])[None]
        gained_EG = _kept(more_EGG, at_home_EG, kept_EGG) - now_E[:, None]
        load_G = (holds_EG * (loads / copies_E)[:, None]).sum(axis=0)
        fits = ~holds_EG & (holds_EG.sum(axis=0) < np.asarray(problem.slots_per_gpu))
        fits &= load_G + (loads / (copies_E + 1))[:, None] <= limit
        gained_EG[~fits] = -np.inf
        expert, gpu = np.unravel_index(int(np.argmax(gained_EG)), gained_EG.shape)
        if not gained_EG[expert, gpu] > 0:
            return holds_EG
        holds_EG[expert, gpu] = True


def _kept(holders_ECG: Mask, at_home_EG: Array, kept_EGG: Array) -> Array:
    """Transitions kept by each expert's tokens with each of C sets of holders, [E, C]."""
    holders = holders_ECG.astype(np.float64)
    home = np.einsum("ecg,eg->ec", holders, at_home_EG)
    # Tokens at other homes are spread over the holders.
    spread = np.einsum("ech,ehg,ecg->ec", 1.0 - holders, kept_EGG, holders, optimize=True)
    kept: Array = home + spread / holders.sum(axis=2)
    return kept


def _holds(slots: Slots, num_experts: int) -> Mask:
    holds = np.zeros((len(slots), num_experts, len(slots[0])), dtype=bool)
    for layer, gpus in enumerate(slots):
        for gpu, held in enumerate(gpus):
            holds[layer, list(held), gpu] = True
    return holds


def _slots(holds_LEG: Mask) -> Slots:
    layers: Sequence[Sequence[NDArray[np.intp]]] = [
        [np.flatnonzero(column) for column in holds.T] for holds in holds_LEG
    ]
    return sorted_slots(layers)
