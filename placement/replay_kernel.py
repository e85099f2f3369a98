"""The token-level part of a replay, compiled: GPUs of pairs, loads of steps, rows through ports, locality of tokens.

Each function replays many steps of one layer; nothing here has more than [N, E], [N, G], [E, G] or [N, B, K] values.

Shape suffixes: N steps, B tokens of a step, T tokens, K choices, E experts, C most copies of an expert, G GPUs.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.dispatch_kernel import SPLIT

#: Index of the link classes: NVLink within a node, network between nodes.
NVLINK, NETWORK = 0, 1


@njit(cache=True, nogil=True)
def count_pairs(
    experts_NBK: NDArray[np.int32], homes_NB: NDArray[np.int32], holds_EG: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that the rule ``level`` has to place, int64 [N, E], and distinct experts of all pairs, int64 [N].

    Args:
        experts_NBK: int32 [N, B, K].
        homes_NB: int32 [N, B], where a token is served if its home holds the expert; -1 for the rule ``level``.
        holds_EG: [E, G], which GPUs hold a copy.
    """
    num_steps, num_tokens, num_choices = experts_NBK.shape
    num_experts = len(holds_EG)
    counts_NE = np.zeros((num_steps, num_experts), dtype=np.int64)
    distinct_N = np.zeros(num_steps, dtype=np.int64)
    seen_E = np.full(num_experts, -1, dtype=np.int64)
    for step in range(num_steps):
        for token in range(num_tokens):
            home = homes_NB[step, token]
            for choice in range(num_choices):
                expert = experts_NBK[step, token, choice]
                if seen_E[expert] != step:
                    seen_E[expert] = step
                    distinct_N[step] += 1
                if home < 0 or not holds_EG[expert, home]:
                    counts_NE[step, expert] += 1
    return counts_NE, distinct_N


@njit(cache=True, nogil=True)
def place_pairs(
    experts_NBK: NDArray[np.int32],
    homes_NB: NDArray[np.int32],
    holds_EG: NDArray[np.bool_],
    copies_EC: NDArray[np.int32],
    counts_NE: NDArray[np.int64],
    chosen_NE: NDArray[np.int32],
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """GPU of every pair, int32 [N, B, K]; active experts and pairs of every GPU, int64 [N, G] each.

    As for the rule, a split expert is active on every GPU with a copy, also where it has fewer pairs than copies.

    Args:
        experts_NBK, homes_NB, holds_EG: as for ``count_pairs``.
        copies_EC: int32 [E, C], GPUs of each expert's copies ascending, padded with -1.
        counts_NE: what ``count_pairs`` returned.
        chosen_NE: the rule's choice for these counts; the i-th of a split expert's n pairs goes to its copy
            (i·copies) // n.
    """
    num_steps, num_tokens, num_choices = experts_NBK.shape
    num_experts, num_gpus = holds_EG.shape
    gpus_NBK = np.empty(experts_NBK.shape, dtype=np.int32)
    active_NG, pairs_NG = np.zeros((2, num_steps, num_gpus), dtype=np.int64)
    last_step_EG = np.full((num_experts, num_gpus), -1, dtype=np.int64)
    num_copies_E = (copies_EC >= 0).sum(axis=1)
    placed_E = np.empty(num_experts, dtype=np.int64)
    for step in range(num_steps):
        placed_E[:] = 0
        for expert in range(num_experts):
            if chosen_NE[step, expert] == SPLIT:
                for gpu in copies_EC[expert, : num_copies_E[expert]]:
                    last_step_EG[expert, gpu] = step
                    active_NG[step, gpu] += 1
        for token in range(num_tokens):
            home = homes_NB[step, token]
            for choice in range(num_choices):
                expert = experts_NBK[step, token, choice]
                if home >= 0 and holds_EG[expert, home]:
                    gpu = home
                else:
                    gpu = chosen_NE[step, expert]
                    if gpu == SPLIT:
                        gpu = copies_EC[expert, placed_E[expert] * num_copies_E[expert] // counts_NE[step, expert]]
                        placed_E[expert] += 1
                gpus_NBK[step, token, choice] = gpu
                pairs_NG[step, gpu] += 1
                if last_step_EG[expert, gpu] != step:
                    last_step_EG[expert, gpu] = step
                    active_NG[step, gpu] += 1
    return gpus_NBK, active_NG, pairs_NG


@njit(cache=True, nogil=True)
def count_rows(
    gpus_NBK: NDArray[np.int32],
    homes_NB: NDArray[np.int32],
    returns_NB: NDArray[np.int32],
    num_gpus: int,
    gpus_per_node: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hidden states of the two exchanges: through the busiest port, int64 [N, 2, 2], and in all, int64 [N, 2].

    A token's state goes once from its home to every other GPU that serves it (exchange 0), and one comes back from each
    to where it returns (exchange 1). The last axis is the link class. A GPU has one port per class and direction.

    Args:
        gpus_NBK: int32 [N, B, K], GPU of every pair.
        homes_NB, returns_NB: int32 [N, B].
        num_gpus, gpus_per_node: topology.
    """
    num_steps, num_tokens, num_choices = gpus_NBK.shape
    busiest_NXC = np.zeros((num_steps, 2, 2), dtype=np.int64)
    rows_NC = np.zeros((num_steps, 2), dtype=np.int64)
    ports = np.empty((2, 2, 2, num_gpus), dtype=np.int64)  # exchange, link class, out or in, GPU
    node_G = np.arange(num_gpus) // gpus_per_node
    seen_G = np.full(num_gpus, -1, dtype=np.int64)
    for step in range(num_steps):
        ports[:] = 0
        for token in range(num_tokens):
            for choice in range(num_choices):
                gpu = gpus_NBK[step, token, choice]
                if seen_G[gpu] == step * num_tokens + token:
                    continue
                seen_G[gpu] = step * num_tokens + token
                for exchange in range(2):
                    other = homes_NB[step, token] if exchange == 0 else returns_NB[step, token]
                    if other != gpu:
                        link = NVLINK if node_G[other] == node_G[gpu] else NETWORK
                        rows_NC[step, link] += 1
                        ports[exchange, link, exchange, other] += 1
                        ports[exchange, link, 1 - exchange, gpu] += 1
        for exchange in range(2):
            for link in range(2):
                busiest_NXC[step, exchange, link] = ports[exchange, link].max()
    return busiest_NXC, rows_NC


@njit(cache=True, nogil=True)
def count_tokens(gpus_TK: NDArray[np.int32], previous_TK: NDArray[np.int32], num_gpus: int) -> NDArray[np.int64]:
    """Per token: distinct GPUs, choice pairs of both layers on one GPU, whether the first choices are: int64 [T, 3].

    Args:
        gpus_TK: int32 [T, K], GPU of every pair.
        previous_TK: the same of the layer before, or int32 [0, K] in the first layer.
        num_gpus: G.
    """
    num_tokens = len(gpus_TK)
    found_T3 = np.zeros((num_tokens, 3), dtype=np.int64)
    choices_G = np.zeros(num_gpus, dtype=np.int64)
    has_previous = len(previous_TK) > 0
    for token in range(num_tokens):
        for gpu in gpus_TK[token]:
            if choices_G[gpu] == 0:
                found_T3[token, 0] += 1
            choices_G[gpu] += 1
        if has_previous:
            for gpu in previous_TK[token]:
                found_T3[token, 1] += choices_G[gpu]
            if gpus_TK[token, 0] == previous_TK[token, 0]:
                found_T3[token, 2] = 1
        for gpu in gpus_TK[token]:
            choices_G[gpu] = 0
    return found_T3
