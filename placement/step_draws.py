"""Drawing steps from the tokens solved on: which tokens stand together, and which experts they make active.

Shape suffixes: T tokens, N steps, M active experts of all steps, B tokens of a step, L layers, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.cost import allreduce_us, gather_routes_us
from placement.errors import ProblemError

#: What the sampled steps of one batch size hold in all layers, and bounds on what they hold in one: active experts, or,
#: where an exchange depends on the plan, token–expert pairs. More cost time; with fewer a search fits the sample.
HELD_IN_ALL = 1_200_000
LEAST_HELD, MOST_HELD = 16_384, 49_152
#: Bounds on the number of steps per batch size; where these would draw too many pairs (tokens × layers × choices), a
#: few steps must do.
FEWEST_STEPS, MOST_STEPS = 32, 4096
MOST_DRAWN, LEAST_STEPS = 32_000_000, 8
#: Tokens up to which steps of one token are not drawn but all used, equal ones once.
MOST_TOKENS_AT_ONCE = 65_536

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ActiveExperts:
    """The active experts of all steps, step after step, ids ascending within a step.

    Attributes:
        starts: int64 [N + 1], where each step begins.
        experts: int16 [M].
        pairs: int32 [M], token–expert pairs.
    """

    starts: NDArray[np.int64]
    experts: NDArray[np.int16]
    pairs: NDArray[np.int32]

    @classmethod
    def of(cls, experts_NBK: NDArray[np.integer], num_experts: int) -> ActiveExperts:
        """From each token's choices."""
        num_steps = len(experts_NBK)
        keys = np.arange(num_steps)[:, None] * num_experts + experts_NBK.reshape(num_steps, -1)
        counts = np.bincount(keys.ravel(), minlength=num_steps * num_experts).reshape(num_steps, num_experts)
        step, expert = np.nonzero(counts)
        starts = np.concatenate([[0], np.cumsum((counts > 0).sum(axis=1))])
        return cls(starts.astype(np.int64), expert.astype(np.int16), counts[step, expert].astype(np.int32))

    def used(self, num_experts: int) -> NDArray[np.bool_]:
        """Whether a step routes to an expert, bool [E, N]."""
        used = np.zeros((num_experts, len(self.starts) - 1), dtype=bool)
        used[self.experts, np.repeat(np.arange(used.shape[1]), np.diff(self.starts))] = True
        return used


@dataclass(frozen=True)
class StepGroup:
    """The sampled steps of one batch size.

    Attributes:
        num_tokens: B.
        constant_us: of every layer and step, whatever the placement: all-reduce, or gather of routes.
        weights: per layer float64 [N], the steps' shares of the expected step time.
        active: per layer, the active experts of every step.
        tokens: per layer int16 [N, B, K]; [0, 0, 0] in ``allreduce``, which moves the same bytes under every plan.
        homes: int16 [N, B], where hidden states are before the first layer.
    """

    num_tokens: int
    constant_us: float
    weights: tuple[Array, ...]
    active: tuple[ActiveExperts, ...]
    tokens: tuple[NDArray[np.int16], ...]
    homes: NDArray[np.int16]


def draw_group(
    routes_TLK: NDArray[np.integer],
    num_experts: int,
    cluster: Cluster,
    exchange: str,
    num_tokens: int,
    share: float,
    seed: int,
    sequence_T: NDArray[np.integer] | None,
) -> StepGroup:
    """Draw the steps of one batch size."""
    available, num_layers, top_k = routes_TLK.shape
    if not available:
        raise ProblemError("objective step_time: the trace has no token to solve on; record more prompts")
    hidden = cluster.coefficients[0].hidden_state_bytes
    if exchange == "allreduce" or cluster.num_gpus == 1:
        constant = allreduce_us(cluster, num_tokens, hidden)
        small = num_tokens == 1 and available <= MOST_TOKENS_AT_ONCE
        if small and (group := _all_tokens(routes_TLK, num_experts, constant, share)) is not None:
            return group
    else:
        constant = gather_routes_us(cluster, num_tokens, top_k)
    moves = exchange != "allreduce" and cluster.num_gpus > 1
    held = min(MOST_HELD, max(LEAST_HELD, HELD_IN_ALL // num_layers))
    held_by_step = num_tokens * top_k if moves else min(num_tokens * top_k, num_experts)
    affordable = max(LEAST_STEPS, MOST_DRAWN // (num_tokens * num_layers * top_k))
    steps = min(max(FEWEST_STEPS, min(MOST_STEPS, held // held_by_step)), affordable)
    tokens_NB = _draw_tokens(available, steps, num_tokens, sequence_T, np.random.default_rng(seed))
    active, tokens = [], []
    for layer in range(num_layers):
        experts_NBK = routes_TLK[:, layer][tokens_NB].astype(np.int16)
        active.append(ActiveExperts.of(experts_NBK, num_experts))
        tokens.append(experts_NBK if moves else np.empty((0, 0, 0), dtype=np.int16))
    homes = (np.arange(steps)[:, None] + np.arange(num_tokens)) % cluster.num_gpus
    return StepGroup(
        num_tokens=num_tokens,
        constant_us=constant,
        weights=(np.full(steps, share / steps),) * num_layers,
        active=tuple(active),
        tokens=tuple(tokens),
        homes=homes.astype(np.int16),
    )


def _draw_tokens(
    available: int,
    num_steps: int,
    num_tokens: int,
    sequence_T: NDArray[np.integer] | None,
    rng: np.random.Generator,
) -> NDArray[np.intp]:
    """Tokens of every step, [N, B], with replacement: from all, or from each step's own draw of sequences."""
    if sequence_T is None:
        return rng.integers(available, size=(num_steps, num_tokens))
    order = np.argsort(sequence_T, kind="stable")
    _, first, length = np.unique(sequence_T[order], return_index=True, return_counts=True)
    tokens = np.empty((num_steps, num_tokens), dtype=np.intp)
    for step in range(num_steps):
        drawn = rng.integers(len(first), size=-(-len(first) // 2))
        ends = np.cumsum(length[drawn])
        at = rng.integers(ends[-1], size=num_tokens)
        which = np.searchsorted(ends, at, side="right")
        tokens[step] = order[first[drawn[which]] + at - (ends[which] - length[drawn[which]])]
    return tokens


def _all_tokens(routes_TLK: NDArray[np.integer], num_experts: int, constant: float, share: float) -> StepGroup | None:
    """Steps of one token: all there are, in each layer one per distinct set of experts; None if they are too many."""
    weights, active = [], []
    for layer in range(routes_TLK.shape[1]):
        sets, seen = np.unique(np.sort(routes_TLK[:, layer], axis=1), axis=0, return_counts=True)
        if len(sets) > 2 * MOST_STEPS:
            return None
        weights.append(share * seen / seen.sum())
        active.append(ActiveExperts.of(sets[:, None], num_experts))
    nothing = np.empty((0, 0, 0), dtype=np.int16)
    homes = np.empty((0, 0), dtype=np.int16)
    return StepGroup(1, constant, tuple(weights), tuple(active), (nothing,) * len(active), homes)
