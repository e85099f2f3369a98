"""Search over the chain of layers: annealed chains, recombined exactly.

The first placement is greedy. Then many chains are annealed from random placements, and a dynamic program picks, layer
by layer, from which chain the layer's placement comes, its GPUs relabelled as suits: the best chain that their layers
can form. Chains annealed again from it and from the best others follow, and are recombined in turn.

Shape suffixes: N chains, L layers, E items (experts and empty slots), G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from placement.strategies.chain_kernel import anneal_swaps
from profiler.affinity_groups import assignment_sweeps, greedy_chain

#: First temperatures of random chains, and of those that start from a good placement; relative to the spread of gains.
HOT, WARM = (1.0, 1.5, 2.0, 3.0), (0.3, 0.6, 1.0, 1.5)
COLD = 0.1
#: First and last price of load above the limit, in spreads of gains per mean load of an item.
CHEAP, DEAR = 6.0, 100.0
#: Labels are aligned, and the time is looked at, this often per chain.
BLOCKS = 20
#: Share of a chain's rounds that accept improvements alone.
COOLED = 0.05
#: Generations of chains, after the random one.
GENERATIONS = 4
MOST_CHAINS, FEWEST_CHAINS = 48, 4
#: Items in all layers up to which the most chains are annealed.
ITEMS_FOR_MOST_CHAINS = 1024

LIMIT_HIT = "the time limit cut the search"

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
#: Called with the best chain's value after each generation.
Found = Callable[[float], None]


@dataclass(frozen=True)
class Chain:
    """What to place.

    Attributes:
        transitions: float64 [L-1, E, E].
        loads: float64 [L, E].
        sizes: items on each GPU; their sum is E.
        limits: float64 [L], the most load of a GPU; infinite where nothing bounds it.
        twins: int64 [L, E], the next copy of the same expert, in a circle; an item's own index where it has no other.
    """

    transitions: Array
    loads: Array
    sizes: tuple[int, ...]
    limits: Array
    twins: Labels

    @property
    def num_gpus(self) -> int:
        """G."""
        return len(self.sizes)

    def kept(self, gpu: Labels) -> float:
        """Transitions kept by a placement [L, E]."""
        same = gpu[:-1, :, None] == gpu[1:, None, :]
        return float((self.transitions * same).sum())

    def gpu_loads(self, gpu: Labels) -> Array:
        """[L, G]."""
        rows = zip(gpu, self.loads, strict=True)
        return np.stack([np.bincount(row, loads, minlength=self.num_gpus) for row, loads in rows])

    def gains(self, gpu: Labels) -> Array:
        """Transitions kept with both neighbour layers if an item stood on a GPU, [L, G, E]."""
        on = _one_hot(gpu, self.num_gpus)
        gains = np.zeros(on.shape)
        gains[1:] += np.matmul(on[:-1], self.transitions)
        gains[:-1] += np.matmul(on[1:], self.transitions.swapaxes(1, 2))
        return gains

    def fits(self, gpu: Labels) -> NDArray[np.bool_]:
        """Layers within their limit, [L]."""
        return self.gpu_loads(gpu).max(axis=1) <= self.limits


@dataclass(frozen=True)
class Budget:
    """How much to search.

    Attributes:
        rounds: of annealing per chain; a round proposes two swaps per item.
        seed: what is found depends on it alone, unless the deadline cuts the search.
        workers: chains annealed side by side.
        deadline: on ``time.perf_counter()``.
    """

    rounds: int
    seed: int
    workers: int
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.perf_counter())

    def until(self, share: float) -> Budget:
        """The same with a share of the time that is left."""
        return replace(self, deadline=time.perf_counter() + share * self.left())


def search_chain(chain: Chain, start: Labels, budget: Budget, found: Found) -> tuple[Labels, str | None]:
    """The best placement found, within the limits.

    Args:
        chain: what to place.
        start: int64 [L, E], within the limits; no worse is returned.
        budget: how much to search.
        found: called now and then.

    Returns:
        GPU of every item, int64 [L, E]; and why the search ended early, or None.
    """
    if sum(size > 0 for size in chain.sizes) < 2:
        return start, None  # nothing to choose
    best = align_labels(chain, start)
    bounded = bool(np.isfinite(chain.limits).any())
    if not bounded:
        best = max(best, greedy_chain(chain.transitions, chain.sizes).astype(np.int64), key=chain.kept)
    found(chain.kept(best))
    search = _Search(chain, start, budget)
    pool: list[Labels] = []
    try:
        if not bounded:
            best = assignment_sweeps(chain.transitions, best, chain.sizes, budget.until(0.3).deadline).astype(np.int64)
            found(chain.kept(best))
        count = min(MOST_CHAINS, max(FEWEST_CHAINS, MOST_CHAINS * ITEMS_FOR_MOST_CHAINS // chain.loads.size))
        ended = search.fit_rounds(best, count + GENERATIONS * (count // 2))
        for generation in range(1 + GENERATIONS):
            if generation == 0:
                origins, hot = [search.random_placement(start, n) for n in range(count)], HOT
            else:
                origins, hot = [best] * (count // 4) + pool[: count // 4], WARM
            fresh = search.anneal_all(origins, hot, generation)
            pool = sorted([*fresh, *pool], key=chain.kept, reverse=True)[: count // 2]
            best = recombine(chain, [best, *fresh, *pool])
            found(chain.kept(best))
            if not budget.left():
                return best, LIMIT_HIT
        return best, ended
    except KeyboardInterrupt:
        return best, "interrupted: this is the best placement found until then"


class _Search:
    """Anneals chains."""

    def __init__(self, chain: Chain, start: Labels, budget: Budget) -> None:
        self.chain = chain
        self.budget = budget
        self.rounds = budget.rounds
        self.stopped = False
        self.to_next = np.ascontiguousarray(chain.transitions)
        self.from_next = np.ascontiguousarray(chain.transitions.swapaxes(1, 2))
        self.bounded = bool(np.isfinite(chain.limits).any())
        self.loads = chain.loads if self.bounded else np.zeros_like(chain.loads)
        self.scale = float(chain.gains(self.random_placement(start, 0)).std(axis=1).mean())
        self.price = self.scale / max(float(chain.loads.mean()), 1e-12)

    def random_placement(self, start: Labels, number: int) -> Labels:
        """A random placement, int64 [L, E]; layers with copies of an expert, which must stay apart, as in ``start``."""
        rng = np.random.default_rng((self.budget.seed, number))
        shuffled = rng.permuted(start, axis=1)
        copied = (self.chain.twins != np.arange(start.shape[1])).any(axis=1)
        return np.where(copied[:, None], start, shuffled)

    def fit_rounds(self, origin: Labels, num_chains: int) -> str | None:
        """Fewer rounds per chain, judged by one short chain, where all chains would not fit into the time; a note."""
        planned, self.rounds = self.rounds, min(self.rounds, BLOCKS)
        self.anneal(origin, WARM[0], (-1, 0))  # compiles
        begun = time.perf_counter()
        self.anneal(origin, WARM[0], (-1, 0))
        per_round = (time.perf_counter() - begun) / self.rounds
        fitting = int(self.budget.left() * self.budget.workers / (num_chains * per_round))
        self.rounds = min(planned, max(1, fitting))
        return LIMIT_HIT if self.rounds < planned else None

    def anneal_all(self, origins: Sequence[Labels], hot: Sequence[float], generation: int) -> list[Labels]:
        """Anneal a chain from each origin."""
        with ThreadPoolExecutor(self.budget.workers) as threads:
            chains = [
                threads.submit(self.anneal, origin, hot[n % len(hot)], (generation, n))
                for n, origin in enumerate(origins)
            ]
            try:
                return [chain.result() for chain in chains]
            except KeyboardInterrupt:
                self.stopped = True
                raise

    def anneal(self, origin: Labels, hot: float, name: tuple[int, int]) -> Labels:
        """Anneal one chain, slightly above its limits perhaps; ``name`` tells its proposals from other chains'."""
        chain = self.chain
        progress = np.arange(self.rounds) / (self.rounds * (1 - COOLED))
        temperatures = np.where(progress < 1, self.scale * hot * (COLD / hot) ** progress, 0.0)
        prices = self.price * CHEAP * (DEAR / CHEAP) ** np.minimum(progress, 1)
        seeds = np.random.default_rng((self.budget.seed, 1, 1 + name[0], name[1])).integers(2**62, size=BLOCKS)
        gpu = origin.copy()
        for block, seed in zip(np.array_split(np.arange(self.rounds), BLOCKS), seeds, strict=True):
            if not len(block) or self.stopped or not self.budget.left():
                continue
            gpu = align_labels(chain, gpu)
            fixed = self.to_next, self.from_next, self.loads, chain.limits, chain.twins
            loads = chain.gpu_loads(gpu) if self.bounded else np.zeros((len(gpu), chain.num_gpus))
            state = gpu, chain.gains(gpu), loads
            anneal_swaps(*fixed, *state, temperatures[block], prices[block], 2 * gpu.shape[1], int(seed))
        return gpu


def align_labels(chain: Chain, gpu: Labels) -> Labels:
    """Permute the GPUs of all layers after each boundary so that most transitions over it stay on their GPU.

    Annealing moves single experts; where two runs of layers agree within themselves but not with each other, only
    this move helps. GPUs with different numbers of items keep their labels apart.
    """
    on = _one_hot(gpu, chain.num_gpus)
    aligned = gpu.copy()
    relabel = np.arange(chain.num_gpus)
    for layer, counts in enumerate(chain.transitions):
        kept = _forbid(on[layer] @ counts @ on[layer + 1].T, chain.sizes)
        before, after = linear_sum_assignment(kept, maximize=True)
        new = np.empty_like(relabel)
        new[after] = relabel[before]
        relabel = new
        aligned[layer + 1] = relabel[gpu[layer + 1]]
    return aligned


def recombine(chain: Chain, pool: Sequence[Labels]) -> Labels:
    """The best chain whose layers each come from some chain of the pool, GPUs relabelled; exact.

    Args:
        chain: what is placed.
        pool: placements int64 [L, E]; layers outside their limit are left out, the first chain must be within.
    """
    states = [_distinct([gpu[layer] for gpu in pool], chain, layer) for layer in range(len(chain.loads))]
    best = np.zeros(len(states[0]))
    came_from = []
    for counts, here, after in zip(chain.transitions, states[:-1], states[1:], strict=True):
        flows = _flows(counts, here, after, chain.num_gpus)
        reached = np.empty((len(here), len(after)))
        for n, m in np.ndindex(reached.shape):
            flow = _forbid(flows[n, :, m], chain.sizes)
            reached[n, m] = best[n] + flow[linear_sum_assignment(flow, maximize=True)].sum()
        came_from.append(reached.argmax(axis=0))
        best = reached.max(axis=0)
    index = int(best.argmax())
    path = [states[-1][index]]
    for layer in range(len(came_from) - 1, -1, -1):
        index = int(came_from[layer][index])
        path.append(states[layer][index])
    return align_labels(chain, np.stack(path[::-1]))


def _distinct(rows: list[Labels], chain: Chain, layer: int) -> Labels:
    """The distinct placements of one layer that keep its limit, [N, E]."""
    unique = np.stack(list({row.tobytes(): row for row in rows}.values()))
    load = _one_hot(unique, chain.num_gpus) @ chain.loads[layer]
    return unique[load.max(axis=1) <= chain.limits[layer]]


def _flows(counts: Array, here: Labels, after: Labels, num_gpus: int) -> Array:
    """Transitions between the GPUs of every two states of adjacent layers, [N, G, M, G]."""
    sources = _one_hot(here, num_gpus) @ counts
    targets = _one_hot(after, num_gpus)
    num_items = here.shape[1]
    flat = sources.reshape(-1, num_items) @ targets.reshape(-1, num_items).T
    return flat.reshape(len(here), num_gpus, len(after), num_gpus)


def _forbid(flow: Array, sizes: Sequence[int]) -> Array:
    """Flow [G, G] where GPUs with different numbers of items cannot be matched."""
    if len(set(sizes)) == 1:
        return flow
    size = np.asarray(sizes)
    return np.where(size[:, None] == size[None, :], flow, -1.0 - flow.sum())


def _one_hot(gpu: Labels, num_gpus: int) -> Array:
    """Float64 [..., G, E] from labels [..., E]."""
    return (gpu[..., None, :] == np.arange(num_gpus)[:, None]).astype(np.float64)
