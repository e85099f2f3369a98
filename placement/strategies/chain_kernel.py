"""The inner loop of the annealing search over the chain of layers, compiled.

Shape suffixes: L layers, E items (experts and empty slots), G GPUs, R rounds.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]


@njit(cache=True, nogil=True)
def anneal_swaps(
    to_next: Array,
    from_next: Array,
    loads: Array,
    limits: Array,
    twins: NDArray[np.int64],
    gpu: NDArray[np.int64],
    gains: Array,
    gpu_loads: Array,
    temperatures: Array,
    prices: Array,
    proposals: int,
    seed: int,
) -> None:
    """Swap items between GPUs within their layers by the rule of Metropolis; gpu, gains and gpu_loads change in place.

    Args:
        to_next: [L-1, E, E], transitions from a of layer l to b of layer l+1.
        from_next: [L-1, E, E], the same transposed, so that both directions read rows.
        loads: [L, E].
        limits: [L], load above which a GPU pays.
        twins: [L, E], the next item of the same expert, in a circle; an item's own index where it has no other copy.
        gpu: [L, E]; copies of an expert stay on different GPUs.
        gains: [L, G, E], transitions kept with both neighbour layers if an item stood on a GPU.
        gpu_loads: [L, G].
        temperatures: [R]; at 0 only improvements are accepted.
        prices: [R], transitions that one unit of load above the limit costs.
        proposals: swaps proposed per layer and round.
        seed: of the proposals.
    """
    num_layers, num_items = gpu.shape
    # Generator xorshift64 (Marsaglia, 2003); its state must not be 0.
    state = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x2545F4914F6CDD1D)
    low, span = np.uint64(0xFFFFFFFF), np.uint64(num_items)
    for r in range(len(temperatures)):
        temperature, price = temperatures[r], prices[r]
        for layer in range(num_layers):
            limit = limits[layer]
            for _ in range(proposals):
                state ^= state << np.uint64(13)
                state ^= state >> np.uint64(7)
                state ^= state << np.uint64(17)
                i = np.int64(((state & low) * span) >> np.uint64(32))
                j = np.int64(((state >> np.uint64(32)) * span) >> np.uint64(32))
                here, there = gpu[layer, i], gpu[layer, j]
                if here == there:
                    continue
                gained = gains[layer, there, i] - gains[layer, here, i] + gains[layer, here, j] - gains[layer, there, j]
                shift = loads[layer, j] - loads[layer, i]
                if shift != 0.0:
                    over = max(0.0, gpu_loads[layer, here] - limit) + max(0.0, gpu_loads[layer, there] - limit)
                    after = max(0.0, gpu_loads[layer, here] + shift - limit)
                    after += max(0.0, gpu_loads[layer, there] - shift - limit)
                    gained -= price * (after - over)
                if gained <= 0.0:
                    if temperature <= 0.0 or gained < -30.0 * temperature:
                        continue
                    state ^= state << np.uint64(13)
                    state ^= state >> np.uint64(7)
                    state ^= state << np.uint64(17)
                    uniform = (np.float64(state >> np.uint64(11)) + 0.5) / 9007199254740992.0
                    if gained < temperature * np.log(uniform):
                        continue
                doubled = False
                twin = twins[layer, i]
                while twin != i:
                    doubled = doubled or gpu[layer, twin] == there
                    twin = twins[layer, twin]
                twin = twins[layer, j]
                while twin != j:
                    doubled = doubled or gpu[layer, twin] == here
                    twin = twins[layer, twin]
                if doubled:
                    continue
                gpu[layer, i], gpu[layer, j] = there, here
                gpu_loads[layer, here] += shift
                gpu_loads[layer, there] -= shift
                if layer + 1 < num_layers:
                    for b in range(num_items):
                        moved = to_next[layer, i, b] - to_next[layer, j, b]
                        gains[layer + 1, here, b] -= moved
                        gains[layer + 1, there, b] += moved
                if layer > 0:
                    for a in range(num_items):
                        moved = from_next[layer - 1, i, a] - from_next[layer - 1, j, a]
                        gains[layer - 1, here, a] -= moved
                        gains[layer - 1, there, a] += moved
