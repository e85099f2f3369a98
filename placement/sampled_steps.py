"""Expected step time of a placement, estimated on steps drawn from the tokens solved on (sample average).

The same cost model as the evaluator's (``placement.cost``), in a form that a search can ask thousands of times.

Shape suffixes: T tokens, N steps, M active experts of all steps, B tokens of a step, L layers, K choices, E experts,
G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.plan import Workload
from placement.slots import Slots
from placement.step_draws import draw_group
from placement.step_kernel import NEVER, layer_costs

Array = NDArray[np.float64]
Held = NDArray[np.bool_]


@dataclass(frozen=True)
class Tables:
    """One layer's placement as the compiled loops take it: copies per expert [E], and their GPUs [E, C], ascending."""

    num_copies: NDArray[np.int16]
    copies: NDArray[np.int16]

    @classmethod
    def of(cls, held_EG: Held) -> Tables:
        """From bool [E, G]."""
        num_copies = held_EG.sum(axis=1)
        expert, gpu = np.nonzero(held_EG)
        copies = np.full((len(held_EG), int(num_copies.max())), -1, dtype=np.int16)
        copies[expert, np.arange(len(expert)) - (np.cumsum(num_copies) - num_copies)[expert]] = gpu
        return cls(num_copies.astype(np.int16), copies)


@dataclass(frozen=True)
class Neighbours:
    """What a layer's exchange needs of the layers around it, per group: homes [N, B], GPUs that serve next."""

    homes: tuple[NDArray[np.int16], ...]
    following: tuple[NDArray[np.int16], ...]


@dataclass(frozen=True)
class Replayed:
    """What n steps of one group cost.

    Attributes:
        us: float64 [n], their times.
        serving: int16 [N, B, K], the GPU of every pair of these steps; undefined in all others.
    """

    us: Array
    serving: NDArray[np.int16]


class SampledSteps:
    """Steps drawn from a problem's tokens, and what they cost under a placement.

    Args:
        routes_TLK: the tokens solved on.
        num_experts: E.
        cluster: with one set of coefficients.
        workload: batch sizes, their shares, exchange.
        split_above_tokens: of the dispatch rule.
        seed: of the draw.
        sequence_T: [T], the sequence of each token. With them, every step draws its tokens from sequences that were
            drawn themselves, with replacement: other prompts will come, and what large steps route then differs more
            than tokens drawn alone would show. Half as many are drawn as there are, because the difference between
            these and as many other prompts has twice the variance of a resample.
    """

    def __init__(
        self,
        routes_TLK: NDArray[np.integer],
        num_experts: int,
        cluster: Cluster,
        workload: Workload,
        split_above_tokens: int | None,
        seed: int,
        sequence_T: NDArray[np.integer] | None = None,
    ) -> None:
        self.num_layers = routes_TLK.shape[1]
        self.top_k = routes_TLK.shape[2]
        self.num_experts = num_experts
        self.num_gpus = cluster.num_gpus
        self.gpus_per_node = cluster.gpus_per_node
        self.chained = workload.exchange == "coherent" and cluster.num_gpus > 1
        self.split_above = NEVER if split_above_tokens is None else split_above_tokens
        known = cluster.coefficients[0]
        self.coefficients = np.array([known.c0_us.value, known.c1_us.value, known.c2_us.value])
        self.links = _links(cluster, known.hidden_state_bytes)
        self.groups = tuple(
            draw_group(routes_TLK, num_experts, cluster, workload.exchange, size, share, seed, sequence_T)
            for size, share in workload.steps()
        )

    def value(self, slots: Slots) -> float:
        """Expected step time of a placement in µs, over all layers."""
        held = [held_experts(layer, self.num_experts) for layer in slots]
        return float(sum(cost.sum() for cost in self.layer_values(held)))

    def layer_values(self, held: list[Held]) -> list[Array]:
        """Contribution of every group to the expected step time, float64 [groups] per layer."""
        values = []
        homes = tuple(group.homes for group in self.groups)
        for layer, held_EG in enumerate(held):
            replayed = self.replay(layer, held_EG, Neighbours(homes, self._nothing_follows()))
            values.append(
                np.array(
                    [
                        float(group.weights[layer] @ (steps.us + group.constant_us))
                        for group, steps in zip(self.groups, replayed, strict=True)
                    ]
                )
            )
            if self.chained:
                homes = tuple(steps.serving[:, :, 0].copy() for steps in replayed)
        return values

    def replay(
        self, layer: int, held_EG: Held, neighbours: Neighbours, steps: list[NDArray[np.intp]] | None = None
    ) -> list[Replayed]:
        """What steps of one layer cost, per group.

        Args:
            layer: index.
            held_EG: the placement.
            neighbours: of the layer.
            steps: which steps of each group; None for all.
        """
        tables = Tables.of(held_EG)
        replayed = []
        for index, group in enumerate(self.groups):
            chosen = np.arange(len(group.weights[layer])) if steps is None else steps[index]
            out = np.empty(len(chosen))
            served = np.empty(group.tokens[layer].shape, dtype=np.int16)
            active = group.active[layer]
            layer_costs(
                *(active.starts, active.experts, active.pairs),
                *(group.tokens[layer], neighbours.homes[index], neighbours.following[index]),
                *(chosen, tables.num_copies, tables.copies, self.split_above),
                *(self.coefficients, self.links, self.gpus_per_node, self.num_gpus, out, served),
            )
            replayed.append(Replayed(out, served))
        return replayed

    def neighbours(self, layer: int, held: list[Held]) -> Neighbours:
        """The neighbours of a layer under a placement of all layers."""
        homes = tuple(group.homes for group in self.groups)
        following = self._nothing_follows()
        if self.chained and layer > 0:
            before = Neighbours(homes, following)
            homes = tuple(steps.serving[:, :, 0].copy() for steps in self.replay(layer - 1, held[layer - 1], before))
        if self.chained and layer + 1 < self.num_layers:
            after = Neighbours(tuple(group.homes for group in self.groups), following)
            following = tuple(steps.serving for steps in self.replay(layer + 1, held[layer + 1], after))
        return Neighbours(homes, following)

    def lower_bound(self) -> float:
        """A step time in µs that no placement on these GPUs goes below, whatever its copies.

        Per layer and step the slowest GPU needs at least the mean GPU's time, and at least that of ⌈distinct / G⌉
        active experts; exchanges need at least their latencies.
        """
        c0, c1, c2 = self.coefficients
        exchanges = 0.0 if self.groups[0].tokens[0].size == 0 else 2 * float(self.links[:, 0].max())
        bound = 0.0
        for group in self.groups:
            for weights, active in zip(group.weights, group.active, strict=True):
                distinct = np.diff(active.starts)
                mean = (c1 * distinct + c2 * group.num_tokens * self.top_k) / self.num_gpus
                least = c0 * (distinct > 0) + np.maximum(mean, c1 * -(-distinct // self.num_gpus))
                bound += float(weights @ (least + exchanges + group.constant_us))
        return bound

    def _nothing_follows(self) -> tuple[NDArray[np.int16], ...]:
        if not self.chained:
            return tuple(np.empty((0, 0, 0), dtype=np.int16) for _ in self.groups)
        return tuple(np.empty((*group.homes.shape, 0), dtype=np.int16) for group in self.groups)


def held_experts(layer_slots: Any, num_experts: int) -> Held:
    """One layer's slots as bool [E, G]."""
    held = np.zeros((num_experts, len(layer_slots)), dtype=bool)
    for gpu, experts in enumerate(layer_slots):
        held[list(experts), gpu] = True
    return held


def _links(cluster: Cluster, hidden_state_bytes: int) -> Array:
    """Latency and time per row of a port, in µs, of the link classes within a node and between nodes: [2, 2]."""
    links = np.zeros((2, 2))
    for index, (link, exists) in enumerate(
        ((cluster.intra_node, cluster.gpus_per_node > 1), (cluster.inter_node, cluster.nodes > 1))
    ):
        if exists:
            links[index] = 1e6 * link.latency_s, 1e6 * hidden_state_bytes / link.bytes_per_s
    return links
