"""Evaluation by replay: what a plan does to tokens that were really routed, independent of every solver.

A batch size is replayed in ``batches`` steps, or in fewer where these would be more than ``MOST_TOKENS`` tokens (but
never in fewer than ``LEAST_STEPS``): means over so many tokens are exact enough, and large steps differ little.

Where a token lives decides what an exchange moves, and what the rule ``nearest`` keeps. ``alltoall``: token i of step n
lives on GPU (i + n) mod G, so that small steps use every GPU as a home alike; its hidden state goes once to every other
GPU that serves it, and comes back. ``coherent``: it lives where its first choice of the layer before was served (first
layer: as for ``alltoall``), and the results meet where its first choice of this layer is served. ``allreduce``: every
GPU has every token, and none has a home.

Shape suffixes: N steps, B tokens of a step, T tokens, S sequences, L layers, K choices, E experts, G GPUs, C link
classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.cost import allreduce_bytes, allreduce_us, expert_us, gather_routes_us, traffic_us
from placement.dispatch import level_dispatch_steps
from placement.errors import ProblemError
from placement.metrics import BatchMetrics, BatchSamples, Metrics, TokenSums, copy_weights, layer_loads
from placement.plan import PlacementPlan
from profiler.trace_format import RoutingTrace, Split

#: Tokens replayed per batch size, at most, unless that would be fewer steps than the least.
MOST_TOKENS = 2**19
LEAST_STEPS = 64
#: Values per step array handled at once; bounds the memory, also with hundreds of GPUs.
VALUES_AT_ONCE = 2**18


def held_out_experts(trace: RoutingTrace, split: Split) -> NDArray[np.integer]:
    """The routes of one split of a trace, [T, L, K]."""
    mask = trace.split_mask(split)
    parts = [chunk.experts[mask[chunk.start : chunk.start + chunk.num_tokens]] for chunk in trace.chunks()]
    return np.concatenate(parts)


def evaluate(
    plan: PlacementPlan,
    trace: RoutingTrace,
    cluster: Cluster,
    split: Split = "odd",
    batch_sizes: Sequence[int] = (1, 8, 32, 128),
    batches: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Replay a trace through a plan.

    Args:
        plan: the placement, its dispatch rule and its exchange.
        trace: what was routed; must be of the plan's model.
        cluster: with the coefficients of the plan's experts (the first entry of ``coefficients`` is used).
        split: which sequences to judge on; solvers use the even ones.
        batch_sizes: tokens per step.
        batches: steps drawn per batch size, their tokens independently and with replacement; fewer for large steps,
            see ``MOST_TOKENS``.
        seed: of the draw, the same for every batch size and plan.

    Raises:
        PlanError: the trace is of another model.
        ProblemError: the cluster has another number of GPUs than the plan, or no coefficients.
    """
    plan.check_model(trace.num_experts, trace.top_k, trace.layer_ids, trace.model_fingerprint)
    return evaluate_routes(plan, held_out_experts(trace, split), cluster, batch_sizes, batches, seed)


def evaluate_routes(
    plan: PlacementPlan,
    experts_TLK: NDArray[np.integer],
    cluster: Cluster,
    batch_sizes: Sequence[int],
    batches: int = 2000,
    seed: int = 0,
    sequence_T: NDArray[np.integer] | None = None,
) -> Metrics:
    """``evaluate`` on routes already in memory.

    Args:
        plan, cluster, batch_sizes, batches, seed: as for ``evaluate``.
        experts_TLK: [T, L, K], what was routed.
        sequence_T: [T], sequence ids; with them, sums by sequence are returned as well.
    """
    if cluster.num_gpus != plan.num_gpus or not cluster.coefficients:
        raise ProblemError(
            f"cluster {cluster.name} has {cluster.num_gpus} GPUs and {len(cluster.coefficients)} sets of "
            f"coefficients; expected the plan's {plan.num_gpus} GPUs and at least one set"
        )
    popularity = np.stack(
        [np.bincount(layer.ravel(), minlength=plan.num_experts) for layer in experts_TLK.swapaxes(0, 1)]
    )
    loads = layer_loads(plan.slots, popularity)
    groups_T, num_groups, sequence_loads = np.zeros(len(experts_TLK), dtype=np.int64), 1, None
    if sequence_T is not None:
        ids, groups_T = np.unique(sequence_T, return_inverse=True)
        num_groups = len(ids)
        sequence_loads = _sequence_loads(plan, experts_TLK, groups_T, num_groups)
    replay = _Replay(plan, cluster, experts_TLK, groups_T, num_groups)
    exact = None if plan.has_copies else replay.sum_all_tokens()
    by_batch_size, samples = {}, {}
    for size in batch_sizes:
        by_batch_size[size], samples[size] = replay.replay_batches(size, batches, seed, exact)
    return Metrics(float(loads.mean()), float(loads.max()), by_batch_size, samples, sequence_loads)


def _sequence_loads(
    plan: PlacementPlan, experts_TLK: NDArray[np.integer], groups_T: NDArray[np.integer], num_groups: int
) -> NDArray[np.float64]:
    """Token–expert pairs of every sequence per layer and GPU, shared evenly by copies: [S, L, G]."""
    weights_LGE = copy_weights(plan.slots, plan.num_experts)
    loads_SLG = np.empty((num_groups, plan.num_layers, plan.num_gpus))
    for layer, weights_GE in enumerate(weights_LGE):
        keys = groups_T[:, None] * plan.num_experts + experts_TLK[:, layer]
        counts = np.bincount(keys.ravel(), minlength=num_groups * plan.num_experts)
        loads_SLG[:, layer] = counts.reshape(num_groups, -1) @ weights_GE.T
    return loads_SLG


class _Replay:
    """Tokens, and a plan to replay them through."""

    def __init__(
        self,
        plan: PlacementPlan,
        cluster: Cluster,
        experts_TLK: NDArray[np.integer],
        groups_T: NDArray[np.integer],
        num_groups: int,
    ) -> None:
        self.plan, self.cluster = plan, cluster
        self.experts_LTK = np.ascontiguousarray(experts_TLK.swapaxes(0, 1))  # a layer's routes stay in the caches
        self.groups_T, self.num_groups = groups_T, num_groups
        self.exchange = plan.workload.exchange
        self.keeps_home = plan.dispatch.rule == "nearest" and self.exchange != "allreduce"
        self.copies = [plan.copies(layer) for layer in range(plan.num_layers)]

    def sum_all_tokens(self) -> TokenSums:
        """Sums over all tokens, which a plan without copies serves the same way in every step."""
        sums_S4 = np.zeros((self.num_groups, 4), dtype=np.int64)
        _, num_tokens, top_k = self.experts_LTK.shape
        tokens_at_once = max(1, VALUES_AT_ONCE // top_k)
        for start in range(0, num_tokens, tokens_at_once):
            tokens_T = np.arange(start, min(start + tokens_at_once, num_tokens))
            counter = _TokenCounter(self.plan.num_gpus, len(tokens_T))
            for layer, copies in enumerate(self.copies):
                counter.add_layer(copies[:, 0][self._experts(tokens_T, layer)])
            sums_S4 += counter.by_group(self.groups_T[tokens_T], self.num_groups)
        return self._token_sums(sums_S4)

    def replay_batches(
        self, batch_size: int, batches: int, seed: int, exact: TokenSums | None
    ) -> tuple[BatchMetrics, BatchSamples]:
        """Metrics of one batch size, and what they are means of; token metrics are those given where they are exact."""
        num_steps = min(batches, max(LEAST_STEPS, MOST_TOKENS // batch_size))
        _, num_tokens, top_k = self.experts_LTK.shape
        widest = max(batch_size * top_k, self.plan.num_experts, self.plan.num_gpus)
        steps_at_once = max(1, VALUES_AT_ONCE // widest)
        generator = np.random.default_rng(seed)
        sums_S4 = np.zeros((self.num_groups, 4), dtype=np.int64)
        parts = []
        for first_step in range(0, num_steps, steps_at_once):
            shape = (min(steps_at_once, num_steps - first_step), batch_size)
            tokens_NB = generator.integers(num_tokens, size=shape)
            counter = _TokenCounter(self.plan.num_gpus, tokens_NB.size) if exact is None else None
            parts.append(self._replay_steps(tokens_NB, first_step, counter))
            if counter is not None:
                sums_S4 += counter.by_group(self.groups_T[tokens_NB.ravel()], self.num_groups)
        experts_N, exchange_N, active_N, nvlink_N, network_N = np.concatenate(parts, axis=1)
        tokens = exact or self._token_sums(sums_S4)
        gpus_per_token, pair_locality, top1_locality = tokens.means()[0].tolist()
        samples = BatchSamples(experts_N + exchange_N, active_N, tokens)
        metrics = BatchMetrics(
            step_us=float(samples.step_us.mean()),
            active_ratio=float(active_N.mean()),
            gpus_per_token=gpus_per_token,
            pair_locality=pair_locality,
            top1_transition_locality=top1_locality,
            expert_us=float(experts_N.mean()),
            exchange_us=float(exchange_N.mean()),
            nvlink_bytes=float(nvlink_N.mean()),
            network_bytes=float(network_N.mean()),
        )
        return metrics, samples

    def _replay_steps(
        self, tokens_NB: NDArray[np.integer], first_step: int, counter: _TokenCounter | None
    ) -> NDArray[np.float64]:
        """Replay steps through all layers: µs of experts, of exchanges, active ratio, bytes by link class: [5, N]."""
        from placement.replay_kernel import count_pairs, place_pairs

        num_steps, batch_size = tokens_NB.shape
        num_gpus, coefficients = self.plan.num_gpus, self.cluster.coefficients[0]
        found_5N = np.zeros((5, num_steps))
        step_N1 = np.arange(first_step, first_step + num_steps)[:, None]
        homes_NB = ((np.arange(batch_size) + step_N1) % num_gpus).astype(np.int32)
        nowhere_NB = np.full_like(homes_NB, -1)
        for layer, copies in enumerate(self.copies):
            experts_NBK = self._experts(tokens_NB, layer)
            holds_EG = (copies[:, :, None] == np.arange(num_gpus)).any(axis=1)
            rule_homes_NB = homes_NB if self.keeps_home else nowhere_NB
            counts_NE, distinct_N = count_pairs(experts_NBK, rule_homes_NB, holds_EG)
            chosen_NE = level_dispatch_steps(counts_NE, copies, num_gpus, self.plan.dispatch.split_above_tokens)
            gpus_NBK, active_NG, pairs_NG = place_pairs(
                experts_NBK, rule_homes_NB, holds_EG, copies, counts_NE, chosen_NE
            )
            found_5N[0] += expert_us(active_NG, pairs_NG, coefficients)
            found_5N[2] += active_NG.max(axis=1) / -(-distinct_N // num_gpus) / self.plan.num_layers
            self._add_exchange(found_5N, gpus_NBK, homes_NB)
            if self.exchange == "coherent":
                homes_NB = np.ascontiguousarray(gpus_NBK[:, :, 0])
            if counter is not None:
                counter.add_layer(gpus_NBK.reshape(-1, gpus_NBK.shape[2]))
        return found_5N

    def _add_exchange(
        self, found_5N: NDArray[np.float64], gpus_NBK: NDArray[np.int32], homes_NB: NDArray[np.int32]
    ) -> None:
        """Add one layer's exchanges: their time, and their bytes by link class."""
        from placement.replay_kernel import count_rows

        _, batch_size, top_k = gpus_NBK.shape
        hidden = self.cluster.coefficients[0].hidden_state_bytes
        if self.plan.num_gpus == 1:
            return
        if self.exchange == "allreduce":
            found_5N[1] += allreduce_us(self.cluster, batch_size, hidden)
            found_5N[3:] += np.array(allreduce_bytes(self.cluster, batch_size, hidden))[:, None]
            return
        returns_NB = np.ascontiguousarray(gpus_NBK[:, :, 0]) if self.exchange == "coherent" else homes_NB
        busiest_NXC, rows_NC = count_rows(
            gpus_NBK, homes_NB, returns_NB, self.plan.num_gpus, self.cluster.gpus_per_node
        )
        for exchange in range(2):
            found_5N[1] += traffic_us(self.cluster, busiest_NXC[:, exchange], hidden)
        found_5N[1] += gather_routes_us(self.cluster, batch_size, top_k)
        found_5N[3:] += rows_NC.T * hidden

    def _experts(self, tokens: NDArray[np.integer], layer: int) -> NDArray[np.int32]:
        """Experts of one layer and some tokens, [..., K]."""
        return self.experts_LTK[layer].take(tokens, axis=0).astype(np.int32)

    def _token_sums(self, sums_S4: NDArray[np.int64]) -> TokenSums:
        tokens, gpus, pairs_kept, top1_kept = sums_S4.T
        return TokenSums(tokens, gpus, pairs_kept, top1_kept, self.plan.num_layers, self.experts_LTK.shape[2])


class _TokenCounter:
    """Counts every token's distinct GPUs, and the pairs that stay on a GPU from layer to layer."""

    def __init__(self, num_gpus: int, num_tokens: int) -> None:
        self.num_gpus = num_gpus
        self.found_T3 = np.zeros((num_tokens, 3), dtype=np.int64)
        self.previous_TK: NDArray[np.int32] | None = None

    def add_layer(self, gpus_TK: NDArray[np.int32]) -> None:
        """Add a layer, from the GPU of every pair."""
        from placement.replay_kernel import count_tokens

        before = np.empty((0, gpus_TK.shape[1]), dtype=np.int32) if self.previous_TK is None else self.previous_TK
        self.found_T3 += count_tokens(gpus_TK, before, self.num_gpus)
        self.previous_TK = gpus_TK

    def by_group(self, groups_T: NDArray[np.integer], num_groups: int) -> NDArray[np.int64]:
        """Tokens and the three sums of each group: [S, 4]."""
        columns = [np.bincount(groups_T, column, num_groups) for column in self.found_T3.T]
        return np.stack([np.bincount(groups_T, minlength=num_groups), *columns], axis=1).astype(np.int64)
