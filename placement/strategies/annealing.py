"""Annealing search over the chain of layers: swaps of experts between GPUs, many chains and layers at once.

With its neighbour layers fixed, a layer's locality is linear in its placement. So layers of one parity are annealed
together against fixed neighbours, then those of the other parity, for all chains at once in numpy.

A layer holds M items: its experts, or, with copies, one item per copy with an even share of the expert's tokens.
Swaps keep the number of items on each GPU, never put two copies of an expert on one GPU, and never exceed a load limit.

Shape suffixes: R chains, L layers, H layers of one parity, M items, E experts, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

ROUNDS_PER_ALIGNMENT = 20
#: First and last temperature, relative to the typical difference that a move makes.
HOT, COLD = 1.0, 0.1

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Items:
    """The items to place in each layer.

    Attributes:
        expert: [L, M], the expert of each item.
        share: float64 [L, M], its share of the expert's tokens.
        load: float64 [L, M], its load.
    """

    expert: NDArray[np.intp]
    share: Array
    load: Array


def single_copies(loads: NDArray[np.integer]) -> Items:
    """One item per expert, from loads [L, E]."""
    num_layers, num_experts = loads.shape
    expert = np.broadcast_to(np.arange(num_experts), (num_layers, num_experts))
    return Items(expert, np.ones(loads.shape), loads.astype(np.float64))


def anneal(
    transitions: NDArray[np.integer],
    items: Items,
    starts: NDArray[np.integer],
    num_gpus: int,
    load_limits: Array | None,
    rounds: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.intp], bool]:
    """Improve starting placements by annealing, and return the best.

    Args:
        transitions: [L-1, E, E].
        items: what to place.
        starts: [R, L, M], GPU of every item in every chain; within the load limits.
        num_gpus: G.
        load_limits: [L], or None.
        rounds: temperatures, falling geometrically; the last fifth accepts improvements alone.
        rng: source of the proposals.

    Returns:
        The GPU of every item of the best chain, intp [L, M]; and whether Ctrl-C ended the search early.
    """
    search = _Search(transitions, items, starts, num_gpus, load_limits)
    num_layers = starts.shape[1]
    scale = search.typical_gain()
    annealed = max(1, rounds - rounds // 5)
    interrupted = False
    try:
        for round_ in range(rounds):
            temperature = scale * HOT * (COLD / HOT) ** (round_ / annealed) if round_ < annealed else 0.0
            for parity in range(min(2, num_layers)):
                search.swap_layers(np.arange(parity, num_layers, 2), temperature, rng)
            if round_ % ROUNDS_PER_ALIGNMENT == 0:
                search.align_labels()
    except KeyboardInterrupt:
        interrupted = True
    return search.gpu[int(np.argmax(search.values()))], interrupted


class _Search:
    """State of all chains."""

    def __init__(
        self,
        transitions: NDArray[np.integer],
        items: Items,
        starts: NDArray[np.integer],
        num_gpus: int,
        load_limits: Array | None,
    ) -> None:
        num_layers, num_items = items.expert.shape
        num_experts = transitions.shape[-1]
        edge = np.zeros((1, num_experts, num_experts))
        self.from_before = np.concatenate([edge, transitions.astype(np.float64)]).swapaxes(1, 2)  # [L, E, E of l-1]
        self.to_next = np.concatenate([transitions.astype(np.float64), edge])  # [L, E, E of l+1]
        self.items = items
        self.gpu = starts.astype(np.intp)
        self.limits = load_limits
        self.num_gpus = num_gpus
        self.copies = num_items > num_experts
        self.weights = np.zeros((len(starts), num_layers, num_experts, num_gpus))
        for layer in range(num_layers):
            self._set_weights(layer)

    def _set_weights(self, layer: int) -> None:
        """Share of each expert on each GPU, in every chain, from the items' GPUs."""
        self.weights[:, layer] = 0.0
        chains = np.arange(len(self.gpu))[:, None]
        self.weights[chains, layer, self.items.expert[layer], self.gpu[:, layer]] = self.items.share[layer]

    def _gains(self, layers: NDArray[np.intp]) -> Array:
        """Transitions kept if an item stood on a GPU, float64 [R, H, M, G]."""
        num_layers = self.weights.shape[1]
        before, after = np.maximum(layers - 1, 0), np.minimum(layers + 1, num_layers - 1)
        gains = np.matmul(self.from_before[layers], self.weights[:, before])
        gains += np.matmul(self.to_next[layers], self.weights[:, after])
        if not self.copies:
            return gains
        of_items = np.take_along_axis(gains, self.items.expert[layers][None, :, :, None], axis=2)
        scaled: Array = of_items * self.items.share[layers][None, :, :, None]
        return scaled

    def typical_gain(self) -> float:
        """Scale of temperatures: the spread of a gain over GPUs, averaged."""
        return float(self._gains(np.arange(self.weights.shape[1])).std(axis=3).mean())

    def values(self) -> Array:
        """Transitions kept by each chain, float64 [R]."""
        for layer in range(self.gpu.shape[1]):
            self._set_weights(layer)
        moved = np.matmul(self.to_next[:-1], self.weights[:, 1:])
        kept: Array = (moved * self.weights[:, :-1]).sum(axis=(1, 2, 3))
        return kept

    def align_labels(self) -> None:
        """Permute the GPUs of all layers after each boundary so that most transitions over it stay on their GPU.

        Annealing moves single experts; where two runs of layers agree within themselves but not with each other, only
        this move helps. GPUs with different numbers of items keep their labels apart.
        """
        sizes = np.bincount(self.gpu[0, 0], minlength=self.num_gpus)
        forbidden = sizes[:, None] != sizes[None, :]
        for chain, gpu in enumerate(self.gpu):
            relabel = np.arange(self.num_gpus)
            for layer in range(1, len(gpu)):
                before, here = self.weights[chain, layer - 1], self.weights[chain, layer]
                kept = before.T @ self.to_next[layer - 1] @ here  # [GPU before, GPU here], both under old labels
                gains = kept[np.argsort(relabel)]
                gains[forbidden] = -1.0 - gains.sum()
                new, old = linear_sum_assignment(gains, maximize=True)
                relabel = np.empty_like(relabel)
                relabel[old] = new
                gpu[layer] = relabel[gpu[layer]]
        for layer in range(self.gpu.shape[1]):
            self._set_weights(layer)

    def swap_layers(self, layers: NDArray[np.intp], temperature: float, rng: np.random.Generator) -> None:
        """One pass over some layers of one parity: as many proposals per layer as it has items, in every chain."""
        gains = self._gains(layers)
        gpu = self.gpu[:, layers]  # a copy, written back below
        num_chains, num_layers, num_items = gpu.shape
        rows, columns = np.ix_(np.arange(num_chains), np.arange(num_layers))
        load = np.zeros((num_chains, num_layers, self.num_gpus))
        np.add.at(load, (rows[..., None], columns[..., None], gpu), self.items.load[layers])
        first = rng.integers(num_items, size=(num_items, num_chains, num_layers))
        second = rng.integers(num_items, size=first.shape)
        thresholds = temperature * np.log(rng.random(first.shape))
        for i, j, threshold in zip(first, second, thresholds, strict=True):
            gpu_i, gpu_j = gpu[rows, columns, i], gpu[rows, columns, j]
            delta = gains[rows, columns, i, gpu_j] - gains[rows, columns, i, gpu_i]
            delta += gains[rows, columns, j, gpu_i] - gains[rows, columns, j, gpu_j]
            accept = (delta > threshold) & (gpu_i != gpu_j)
            if self.copies:
                accept &= ~self._doubles(gpu, layers, (rows, columns), (i, j), (gpu_i, gpu_j))
            shift = self.items.load[layers][columns, j] - self.items.load[layers][columns, i]
            if self.limits is not None:
                limit = self.limits[layers]
                accept &= load[rows, columns, gpu_i] + shift <= limit
                accept &= load[rows, columns, gpu_j] - shift <= limit
            r, h = np.nonzero(accept)
            i, j, gpu_i, gpu_j, shift = (array[r, h] for array in (i, j, gpu_i, gpu_j, shift))
            gpu[r, h, i], gpu[r, h, j] = gpu_j, gpu_i
            load[r, h, gpu_i] += shift
            load[r, h, gpu_j] -= shift
        self.gpu[:, layers] = gpu
        for layer in layers:
            self._set_weights(int(layer))

    def _doubles(
        self,
        gpu: NDArray[np.intp],
        layers: NDArray[np.intp],
        where: tuple[NDArray[np.intp], NDArray[np.intp]],
        items: tuple[NDArray[np.intp], NDArray[np.intp]],
        gpus: tuple[NDArray[np.intp], NDArray[np.intp]],
    ) -> NDArray[np.bool_]:
        """Whether a swap would put two copies of an expert on one GPU, bool [R, H]."""
        expert = self.items.expert[layers]
        doubles = np.zeros(gpu.shape[:2], dtype=bool)
        for item, target in (items[0], gpus[1]), (items[1], gpus[0]):
            same_expert = expert[None] == expert[where[1], item][..., None]
            doubles |= (same_expert & (gpu == target[..., None])).any(axis=2)
        return doubles
