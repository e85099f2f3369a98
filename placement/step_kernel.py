"""Compiled loops of the step-time search: what one layer costs in sampled steps, under the rule ``level``.

The rule is that of ``placement.dispatch``; here it runs fused with the cost model, one step after the other, so that a
search can ask for thousands of placements. Tests compare it with the evaluator.

A step is the list of its active experts, ids ascending, with their token–expert pairs.

Shape suffixes: N steps, A active experts of a step, M active experts of all steps, B tokens of a step, K choices,
E experts, C most copies, G GPUs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

SPLIT = -2
#: Stands for "never split".
NEVER = 2**30


@njit(cache=True, nogil=True)
def choose_copies(
    active: Any, counts: Any, num_copies: Any, copies: Any, split_above: int, chosen: Any, load: Any, scratch: Any
) -> None:
    """Apply ``level`` to one step (in place).

    Args:
        active, counts: [A], experts ascending, and their pairs.
        num_copies, copies: [E], [E, C], GPUs of the copies, ascending.
        split_above: most pairs of an expert that one copy serves.
        chosen: int [E], gets the GPU or ``SPLIT`` at each active expert.
        load: int [G], gets the active experts of each GPU.
        scratch: int [6, max(E, G)].
    """
    load[:] = 0
    waiting = scratch[5]
    num_waiting = 0
    for index in range(len(active)):
        expert = active[index]
        if num_copies[expert] == 1:
            chosen[expert] = copies[expert, 0]
            load[copies[expert, 0]] += 1
        else:  # by (copies, id): sorted in, ids come ascending
            place = num_waiting
            while place > 0 and num_copies[active[waiting[place - 1]]] > num_copies[expert]:
                waiting[place] = waiting[place - 1]
                place -= 1
            waiting[place] = index
            num_waiting += 1
    total = len(active) - num_waiting
    for position in range(num_waiting):
        expert = active[waiting[position]]
        copied = num_copies[expert]
        if counts[waiting[position]] > split_above:
            chosen[expert] = SPLIT
            total += copied
            for copy in range(copied):
                load[copies[expert, copy]] += 1
            continue
        best = copies[expert, 0]
        for copy in range(1, copied):
            gpu = copies[expert, copy]
            if load[gpu] < load[best]:
                best = gpu
        chosen[expert] = best
        load[best] += 1
        total += 1
    if num_waiting and load.max() > -(-total // len(load)):
        _level(active, num_copies, copies, -(-total // len(load)), chosen, load, scratch)


@njit(cache=True, nogil=True)
def _level(active: Any, num_copies: Any, copies: Any, least: int, chosen: Any, load: Any, scratch: Any) -> None:
    """Move experts along shortest paths of alternative copies until no overfull GPU can be relieved."""
    num_gpus = len(load)
    tried = scratch[3]
    tried[:num_gpus] = 0
    while True:
        start = -1
        for gpu in range(num_gpus):
            if load[gpu] > least and tried[gpu] == 0 and (start < 0 or load[gpu] > load[start]):
                start = gpu
        if start < 0:
            return
        end = _path_to_relief(start, active, num_copies, copies, chosen, load, scratch)
        if end < 0:
            tried[start] = 1
            continue
        tried[:num_gpus] = 0
        parent, path = scratch[0], scratch[4]
        length = 0
        gpu = end
        while gpu != start:
            path[length] = gpu
            length += 1
            gpu = parent[gpu]
        source = start
        for step in range(length - 1, -1, -1):
            target = path[step]
            _move_lowest(source, target, active, num_copies, copies, chosen)
            source = target
        load[start] -= 1
        load[end] += 1


@njit(cache=True, nogil=True)
def _move_lowest(source: int, target: int, active: Any, num_copies: Any, copies: Any, chosen: Any) -> None:
    for expert in active:
        if chosen[expert] == source:
            for copy in range(num_copies[expert]):
                if copies[expert, copy] == target:
                    chosen[expert] = target
                    return


@njit(cache=True, nogil=True)
def _path_to_relief(start: int, active: Any, num_copies: Any, copies: Any, chosen: Any, load: Any, scratch: Any) -> int:
    """Breadth-first search; the GPU to relieve to, or -1. Parents are left in ``scratch[0]``."""
    num_gpus = len(load)
    parent, queue, near = scratch[0], scratch[1], scratch[2]
    parent[:num_gpus] = -1
    parent[start] = start
    queue[0] = start
    first, last = 0, 1
    while first < last:
        end = -1
        level_end = last
        for position in range(first, level_end):
            source = queue[position]
            near[:num_gpus] = 0
            for expert in active:
                if chosen[expert] == source:
                    for copy in range(num_copies[expert]):
                        near[copies[expert, copy]] = 1
            for gpu in range(num_gpus):
                if near[gpu] == 1 and parent[gpu] < 0:
                    parent[gpu] = source
                    queue[last] = gpu
                    last += 1
                    if load[gpu] <= load[start] - 2 and (end < 0 or gpu < end):
                        end = gpu
        if end >= 0:
            return end
        first = level_end
    return -1


@njit(cache=True, nogil=True)
def experts_us(
    active: Any, counts: Any, num_copies: Any, copies: Any, chosen: Any, load: Any, pairs: Any, coefficients: Any
) -> float:
    """Time of the slowest GPU's experts in one step, in µs; ``pairs`` int [G] gets the pairs of each GPU."""
    pairs[:] = 0
    for index in range(len(active)):
        expert = active[index]
        if chosen[expert] != SPLIT:
            pairs[chosen[expert]] += counts[index]
            continue
        copied = num_copies[expert]
        served = 0
        for copy in range(copied):
            until = -(-(copy + 1) * counts[index] // copied)  # where the next copy's run begins
            pairs[copies[expert, copy]] += until - served
            served = until
    slowest = 0.0
    for gpu in range(len(load)):
        if load[gpu] > 0:
            slowest = max(slowest, coefficients[0] + coefficients[1] * load[gpu] + coefficients[2] * pairs[gpu])
    return slowest


@njit(cache=True, nogil=True)
def serve_tokens(
    tokens: Any, active: Any, counts: Any, num_copies: Any, copies: Any, chosen: Any, rank: Any, serving: Any
) -> None:
    """GPU of every pair of one step: ``tokens`` and ``serving`` int [B, K], experts and GPUs; ``rank`` int [2, E]."""
    for index in range(len(active)):
        rank[0, active[index]] = 0
        rank[1, active[index]] = counts[index]
    for token in range(tokens.shape[0]):
        for choice in range(tokens.shape[1]):
            expert = tokens[token, choice]
            gpu = chosen[expert]
            if gpu == SPLIT:
                gpu = copies[expert, rank[0, expert] * num_copies[expert] // rank[1, expert]]
                rank[0, expert] += 1
            serving[token, choice] = gpu


@njit(cache=True, nogil=True)
def count_rows(here: int, others: Any, gpus_per_node: int, outwards: bool, rows: Any) -> None:
    """Add the hidden states between a GPU and the distinct others of a token to ``rows`` int [2 classes, 2 ways, G]."""
    for choice in range(len(others)):
        other = others[choice]
        new = other != here
        for earlier in range(choice):
            new = new and others[earlier] != other
        if new:
            link = 0 if other // gpus_per_node == here // gpus_per_node else 1
            rows[link, 0, here if outwards else other] += 1
            rows[link, 1, other if outwards else here] += 1


@njit(cache=True, nogil=True)
def exchange_us(rows: Any, links: Any) -> float:
    """Time of one exchange: that of the slower link class; ``links`` float64 [2, 2]: latency, µs per row of a port."""
    slowest = 0.0
    for link in range(2):
        busiest = 0
        for way in range(2):
            for gpu in range(rows.shape[2]):
                busiest = max(busiest, rows[link, way, gpu])
        slowest = max(slowest, links[link, 0] + links[link, 1] * busiest)
    return slowest


@njit(cache=True, nogil=True)
def layer_costs(
    starts: Any,
    active: Any,
    counts: Any,
    tokens: Any,
    homes: Any,
    following: Any,
    steps: Any,
    num_copies: Any,
    copies: Any,
    split_above: int,
    coefficients: Any,
    links: Any,
    gpus_per_node: int,
    num_gpus: int,
    out: Any,
    serving: Any,
) -> None:
    """Time of some steps of one layer, in µs: the slowest GPU's experts and the exchanges.

    Args:
        starts: int [N + 1], where each step's active experts begin in ``active`` and ``counts``.
        active, counts: [M], experts and their pairs.
        tokens: [N, B, K], each token's choices; no tokens (B = 0) leaves the exchange out.
        homes: [N, B], where each token's hidden state is.
        following: [N, B, K] where tokens stay with their first choice (``coherent``): the GPUs that serve them in the
            next layer, or [N, B, 0] in the last layer; no steps ([0, 0, 0]) where tokens return home (``alltoall``).
        steps: int [n], the steps to compute.
        num_copies, copies, split_above: as for ``choose_copies``.
        coefficients: float64 [3], c0, c1, c2 in µs.
        links: float64 [2, 2], as for ``exchange_us``.
        gpus_per_node, num_gpus: topology.
        out: float64 [n], gets the times.
        serving: int [N, B, K], gets the GPU of every pair of these steps.
    """
    num_experts = len(num_copies)
    chosen = np.empty(num_experts, np.int16)
    rank = np.empty((2, num_experts), np.int64)
    load = np.empty(num_gpus, np.int32)
    pairs = np.empty(num_gpus, np.int64)
    scratch = np.empty((6, max(num_experts, num_gpus)), np.int32)
    rows = np.empty((2, 2, num_gpus), np.int64)
    num_tokens = tokens.shape[1]
    for index in range(len(steps)):
        step = steps[index]
        ours = active[starts[step] : starts[step + 1]]
        number = counts[starts[step] : starts[step + 1]]
        choose_copies(ours, number, num_copies, copies, split_above, chosen, load, scratch)
        out[index] = experts_us(ours, number, num_copies, copies, chosen, load, pairs, coefficients)
        if num_tokens == 0:
            continue
        served = serving[step]
        serve_tokens(tokens[step], ours, number, num_copies, copies, chosen, rank, served)
        rows[:] = 0
        for token in range(num_tokens):
            count_rows(homes[step, token], served[token], gpus_per_node, True, rows)
        dispatch = exchange_us(rows, links)
        if len(following) == 0:
            out[index] += 2 * dispatch  # results go back the way that hidden states came
            continue
        rows[:] = 0
        for token in range(num_tokens):
            count_rows(served[token, 0], served[token], gpus_per_node, False, rows)
        out[index] += dispatch + exchange_us(rows, links)
        if following.shape[2] > 0:
            rows[:] = 0
            for token in range(num_tokens):
                count_rows(served[token, 0], following[step, token], gpus_per_node, True, rows)
            out[index] += exchange_us(rows, links)
