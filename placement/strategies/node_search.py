"""Nodes first, GPUs second: links between nodes are an order slower than those within, so they are spared first.

Shape suffixes: L layers, M items, m items of a node, N nodes, G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.metrics import even_locality
from placement.problem import PlacementProblem
from placement.slots import Slots, sorted_slots
from placement.strategies.balance_search import busiest_load, swap_copies
from placement.strategies.chain_search import Budget, Chain, Found, Labels, search_chain
from placement.strategies.eplb import pack_layer
from placement.strategies.locality_start import Items


def search_nodes_first(items: Items, gpus_per_node: int, budget: Budget, found: Found) -> tuple[Labels, str | None]:
    """Place items without copies on nodes so that most transitions stay there, then each node's items on its GPUs.

    Args:
        items: what to place, and a placement within the load bound.
        gpus_per_node: a divisor of the number of GPUs.
        budget, found: as for ``search_chain``.

    Returns:
        GPU of every item, int64 [L, M]; and why the search ended early, or None.
    """
    chain = items.chain
    num_nodes = chain.num_gpus // gpus_per_node
    sizes = [chain.sizes[n * gpus_per_node : (n + 1) * gpus_per_node] for n in range(num_nodes)]
    node = items.start // gpus_per_node
    whole = Chain(chain.transitions, chain.loads, tuple(map(sum, sizes)), np.full(len(node), np.inf), chain.twins)
    bounded = bool(np.isfinite(chain.limits).any())
    if bounded:
        # Half of what the bound allows is left to the GPUs within the node, whose items divide less evenly.
        mean = chain.loads.sum(axis=1) / num_nodes
        limits = np.maximum((mean + chain.limits * gpus_per_node) / 2, whole.gpu_loads(node).max(axis=1))
        whole = Chain(whole.transitions, whole.loads, whole.sizes, limits, whole.twins)
    node, ended = search_chain(whole, node, budget.until(0.5), lambda kept: None)
    gpu = np.empty_like(node)
    for n in range(num_nodes):
        members = np.stack([np.flatnonzero(row == n) for row in node])
        part = _part(chain, members, sizes[n])
        start = _start(part, bounded)
        if start is None:
            return search_chain(chain, items.start, budget, found)
        placed, early = start, None
        if ended is None or not ended.startswith("interrupted"):
            placed, early = search_chain(part, start, budget.until(1 / (num_nodes - n)), lambda kept: None)
        np.put_along_axis(gpu, members, placed + n * gpus_per_node, axis=1)
        ended = ended or early
    found(chain.kept(gpu))
    return gpu, ended


def node_locality(problem: PlacementProblem, slots: Slots) -> float:
    """Share of transitions that stay on a node, copies sharing evenly; experts stand once per node here."""
    size = problem.gpus_per_node
    merged = [
        [sorted({e for held in gpus[start : start + size] for e in held}) for start in range(0, len(gpus), size)]
        for gpus in slots
    ]
    return even_locality(sorted_slots(merged), problem.transitions)


def _part(chain: Chain, members: NDArray[np.intp], sizes: Sequence[int]) -> Chain:
    """The chain of one node's items [L, m]."""
    pairs = zip(chain.transitions, members[:-1], members[1:], strict=True)
    transitions = np.stack([counts[np.ix_(here, after)] for counts, here, after in pairs])
    loads = np.take_along_axis(chain.loads, members, axis=1)
    twins = np.tile(np.arange(members.shape[1]), (len(members), 1))
    return Chain(transitions, loads, tuple(sizes), chain.limits, twins)


def _start(part: Chain, bounded: bool) -> Labels | None:
    """A placement of a node's items within the limits, or None where none was found."""
    start = np.tile(np.repeat(np.arange(part.num_gpus), part.sizes), (len(part.loads), 1))
    if not bounded:
        return start
    ones = np.ones(part.loads.shape[1], dtype=np.int64)
    for layer, loads in enumerate(part.loads):
        gpus = swap_copies(loads, pack_layer(loads, ones, part.sizes))
        if busiest_load(loads, gpus) > part.limits[layer]:
            return None
        for gpu, held in enumerate(gpus):
            start[layer, held] = gpu
    return start
