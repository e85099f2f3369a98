"""From a running plan to a new one: which expert copies move, in an order that keeps every expert served.

Within a layer, one GPU is a node of a graph, and every expert that leaves all its GPUs is an edge from one it leaves to
one it enters. What enters a GPU overwrites what leaves it, so a walk along the edges, executed from its end, never
overwrites an expert that is not elsewhere yet. Only a closed walk needs a buffer; one walk covers a connected part.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from placement.errors import PlanError
from placement.slots import Slots

#: Where walks begin and end: slots that are free, or hold an expert that stays elsewhere.
OUTSIDE = -1
#: Keeps an assignment from pairing GPUs with different numbers of slots; above every number of experts of a model.
FORBIDDEN = 10**9


@dataclass(frozen=True)
class Move:
    """One expert copy to transfer.

    Attributes:
        layer: index among the MoE layers.
        expert: logical expert.
        source_gpu: a GPU that holds it by then.
        target_gpu: a GPU that gets it.
        replaces: expert whose slot on the target it takes; None for a free slot.
        staged: it waits in the target's spare buffer, where it may be the expert's only copy, and takes the slot right
            after the layer's move of ``replaces``, the last one of its cycle. At most one expert waits at a time.
    """

    layer: int
    expert: int
    source_gpu: int
    target_gpu: int
    replaces: int | None
    staged: bool = False


def plan_moves(old: Slots, new: Slots, gpus_per_node: int | None = None) -> list[Move]:
    """Transfers that turn one placement into another, in an order of execution.

    Executed one after the other, no expert is ever without a copy, and no GPU holds more experts than the old or the
    new placement gives it (plus one waiting in a buffer). After the last move of a layer, GPUs drop what the new
    placement does not list.

    Args:
        old, new: placements of the same experts on the same GPUs.
        gpus_per_node: GPUs that share fast links; sources on the target's node come first. None for one node.

    Returns:
        As many moves as ``num_moves`` says, layer by layer.

    Raises:
        PlanError: the placements are for different layers, GPUs or experts, or nodes do not divide the GPUs.
    """
    _check_same_shape(old, new)
    per_node = _gpus_per_node(new, gpus_per_node)
    sent = [0] * len(new[0])
    moves = []
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after:
            moves += _LayerMoves(layer, before, after, per_node, sent).ordered()
    return moves


def num_moves(old: Slots, new: Slots) -> int:
    """Expert copies to transfer: those that a GPU holds in the new placement and not in the old."""
    _check_same_shape(old, new)
    return sum(
        len(set(after) - set(before))
        for layer_before, layer_after in zip(old, new, strict=True)
        for before, after in zip(layer_before, layer_after, strict=True)
    )


def moves_document(moves: Sequence[Move], expert_bytes: int | None = None) -> dict[str, Any]:
    """The moves as ``plan.json`` stores them.

    Args:
        moves: in order of execution.
        expert_bytes: bytes of one expert in one layer; None where unknown.

    Returns:
        ``num_moves``, ``bytes`` (where known), ``moves`` as rows [layer, expert, source, target, replaces], and
        ``staged``, the indices of moves that go through the target's buffer (see ``Move``).
    """
    document: dict[str, Any] = {"num_moves": len(moves)}
    if expert_bytes is not None:
        document["bytes"] = len(moves) * expert_bytes
    rows = [[move.layer, move.expert, move.source_gpu, move.target_gpu, move.replaces] for move in moves]
    staged = [index for index, move in enumerate(moves) if move.staged]
    return document | {"moves": rows, "staged": staged}


def align_to(old: Slots, new: Slots, gpus_per_node: int | None = None, per_layer: bool = False) -> Slots:
    """The new placement with its GPUs renamed so that the fewest copies move.

    Nodes are exchanged as a whole and GPUs within their node; a GPU takes another's name only where both hold the same
    number of experts in their fullest layer.

    Args:
        old, new: placements of the same experts on the same GPUs.
        gpus_per_node: GPUs that share fast links; None for one node.
        per_layer: rename within every layer alone, which changes locality; else once for all layers.

    Raises:
        PlanError: the placements are for different layers, GPUs or experts.
    """
    _check_same_shape(old, new)
    per_node = _gpus_per_node(new, gpus_per_node)
    fullest = np.array([max(len(layer[gpu]) for layer in new) for gpu in range(len(new[0]))])
    stay_LGG = _held(new) @ _held(old).swapaxes(1, 2)
    if not per_layer:
        stay_LGG = stay_LGG.sum(axis=0, keepdims=True)
    stay_LGG = np.where(fullest[:, None] == fullest[None, :], stay_LGG, -FORBIDDEN)
    names = [_best_names(stay_GG, per_node) for stay_GG in stay_LGG]
    renamed = []
    for layer, gpus in enumerate(new):
        gpu_of = np.argsort(names[layer if per_layer else 0])
        renamed.append(tuple(gpus[gpu] for gpu in gpu_of.tolist()))
    return tuple(renamed)


def _best_names(stay_GG: NDArray[np.floating], per_node: int) -> NDArray[np.intp]:
    """Old name of every new GPU [G] that keeps most: GPUs within a pair of nodes first, then nodes."""
    num_nodes = len(stay_GG) // per_node
    blocks = stay_GG.reshape(num_nodes, per_node, num_nodes, per_node).swapaxes(1, 2)
    inner = np.empty((num_nodes, num_nodes, per_node), dtype=np.intp)
    kept = np.empty((num_nodes, num_nodes))
    for pair in np.ndindex(kept.shape):
        rows, inner[pair] = linear_sum_assignment(blocks[pair], maximize=True)
        kept[pair] = blocks[pair][rows, inner[pair]].sum()
    rows, nodes = linear_sum_assignment(kept, maximize=True)
    return (nodes[:, None] * per_node + inner[rows, nodes]).ravel()


def _held(slots: Slots) -> NDArray[np.float64]:
    """[L, G, E], 1 where a GPU holds an expert."""
    num_experts = 1 + max(expert for gpu in slots[0] for expert in gpu)
    held = np.zeros((len(slots), len(slots[0]), num_experts))
    for layer, gpus in enumerate(slots):
        for gpu, experts in enumerate(gpus):
            held[layer, gpu, list(experts)] = 1
    return held


def _check_same_shape(old: Slots, new: Slots) -> None:
    """Refuse placements that are not of the same experts on the same GPUs."""
    for name, before, after in (
        ("layers", len(old), len(new)),
        ("GPUs", {len(layer) for layer in old}, {len(layer) for layer in new}),
        ("experts", [set().union(*layer) for layer in old], [set().union(*layer) for layer in new]),
    ):
        if before != after:
            raise PlanError(f"the running plan and the new one are for different {name}: solve for the running model")


def _gpus_per_node(slots: Slots, gpus_per_node: int | None) -> int:
    num_gpus = len(slots[0])
    if gpus_per_node is None:
        return num_gpus
    if gpus_per_node < 1 or num_gpus % gpus_per_node:
        raise PlanError(f"gpus_per_node {gpus_per_node}: expected a divisor of {num_gpus}, the number of GPUs")
    return gpus_per_node


class _LayerMoves:
    """One layer: what enters and leaves each GPU, and the moves in order.

    An expert without a GPU that keeps it is *carried*: from one GPU that it leaves (which holds it until then) to one
    that it enters. All its other copies, and those of experts that some GPU keeps, come and go without constraint.
    """

    def __init__(
        self,
        layer: int,
        before: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
        per_node: int,
        sent: list[int],
    ) -> None:
        self.layer, self.per_node, self.sent = layer, per_node, sent
        self.moves: list[Move] = []
        self.holders, holders_after = _holders(before), _holders(after)
        self.entering = [sorted(set(a) - set(b)) for b, a in zip(before, after, strict=True)]
        # Slots that an entering expert may take at once: free ones first, so that copies live long.
        self.open: list[list[int | None]] = [
            [None] * max(0, len(a) - len(b)) for b, a in zip(before, after, strict=True)
        ]
        self.carried: dict[int, tuple[int, int]] = {}
        for expert, gpus in self.holders.items():
            if gpus.isdisjoint(holders_after[expert]):
                pairs = [(source, target) for source in gpus for target in holders_after[expert]]
                self.carried[expert] = min(pairs, key=lambda pair: (self._node(pair[0]) != self._node(pair[1]), pair))
        for gpu, (b, a) in enumerate(zip(before, after, strict=True)):
            self.open[gpu] += [e for e in sorted(set(b) - set(a)) if e not in self.carried or self.carried[e][0] != gpu]

    def ordered(self) -> list[Move]:
        """Carried experts along their walks first; afterwards every other copy has a source."""
        edges = self._edges()
        for start in edges:  # OUTSIDE is the first: what it reaches needs no buffer
            walk: list[int] = []
            for expert in _closed_walk(edges, start):
                if expert != OUTSIDE:
                    walk.append(expert)
                elif walk:
                    self._carry(walk)
                    walk = []
            if walk:
                self._carry_around(walk)
        for gpu, experts in enumerate(self.entering):
            for expert in experts:
                if expert not in self.carried or self.carried[expert][1] != gpu:
                    self._move(expert, gpu, self.open[gpu].pop(0))
        return self.moves

    def _edges(self) -> dict[int, list[tuple[int, int]]]:
        """Carried experts as edges (target, expert) by source, made balanced by edges from and to ``OUTSIDE``."""
        edges: dict[int, list[tuple[int, int]]] = {gpu: [] for gpu in range(OUTSIDE, len(self.open))}
        num_in = [0] * len(self.open)
        for expert, (source, target) in self.carried.items():
            edges[source].append((target, expert))
            num_in[target] += 1
        for gpu, slots in enumerate(self.open):
            ends = min(num_in[gpu], len(slots))
            begins = len(edges[gpu]) - num_in[gpu] + ends
            edges[gpu] += [(OUTSIDE, OUTSIDE)] * ends
            edges[OUTSIDE] += [(gpu, OUTSIDE)] * begins
        return edges

    def _carry(self, walk: Sequence[int]) -> None:
        """An open walk: its last expert takes an open slot, every other the slot of the next one."""
        slot = self.open[self.carried[walk[-1]][1]].pop(0)
        for expert in reversed(walk):
            self._move(expert, self.carried[expert][1], slot)
            slot = expert
        self.open[self.carried[walk[0]][0]].append(walk[0])

    def _carry_around(self, walk: Sequence[int]) -> None:
        """A closed walk: its last expert waits in the buffer of the GPU that the first one leaves."""
        for expert, slot in zip(reversed(walk), [walk[0], *reversed(walk[1:])], strict=True):
            self._move(expert, self.carried[expert][1], slot, staged=expert == walk[-1])
        self.holders[walk[0]].discard(self.carried[walk[0]][0])

    def _move(self, expert: int, target: int, replaces: int | None, staged: bool = False) -> None:
        source = min(self.holders[expert], key=lambda gpu: (self._node(gpu) != self._node(target), self.sent[gpu], gpu))
        self.sent[source] += 1
        self.moves.append(Move(self.layer, expert, source, target, replaces, staged))
        self.holders[expert].add(target)
        if replaces is not None and not staged:
            self.holders[replaces].discard(target)

    def _node(self, gpu: int) -> int:
        return gpu // self.per_node


def _closed_walk(edges: dict[int, list[tuple[int, int]]], start: int) -> list[int]:
    """Labels of all edges that can be reached, in the order of one closed walk from ``start``; takes them out.

    Args:
        edges: (target, label) by node; as many leave every node as enter it.

    Source: C. Hierholzer, Mathematische Annalen 6 (1873).
    """
    walk: list[int] = []
    path = [(start, OUTSIDE)]
    while path:
        node, label = path[-1]
        if edges[node]:
            path.append(edges[node].pop())
        else:
            walk.append(label)
            path.pop()
    return walk[-2::-1]  # without the label that stands for the start


def _holders(gpus: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """GPUs that hold each expert."""
    holders = defaultdict(set)
    for gpu, experts in enumerate(gpus):
        for expert in experts:
            holders[expert].add(gpu)
    return holders
