"""Evaluation by replay: what a plan does to tokens that were really routed, independent of every solver.

Shape suffixes: T tokens, N steps (batches), B tokens of a step, L layers, K choices, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.cluster import Cluster
from placement.cost import allreduce_us, expert_us, gather_routes_us, traffic_us
from placement.dispatch import SPLIT, level_dispatch_steps
from placement.errors import ProblemError
from placement.metrics import BatchMetrics, Metrics, layer_loads
from placement.plan import PlacementPlan
from profiler.trace_format import RoutingTrace, Split

#: Tokens replayed at once; bounds the memory of a step's intermediate arrays.
TOKENS_AT_ONCE = 65536


@dataclass
class _Sums:
    """Sums over replayed steps of one batch size; locality and GPU sums are over tokens."""

    steps: int = 0
    tokens: int = 0
    active_ratio: float = 0.0
    expert_us: float = 0.0
    exchange_us: float = 0.0
    gpus: int = 0
    pairs_kept: int = 0
    top1_kept: int = 0


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
        batches: steps drawn per batch size, their tokens independently and with replacement.
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
) -> Metrics:
    """``evaluate`` on routes [T, L, K] already in memory."""
    if cluster.num_gpus != plan.num_gpus or not cluster.coefficients:
        raise ProblemError(
            f"cluster {cluster.name} has {cluster.num_gpus} GPUs and {len(cluster.coefficients)} sets of "
            f"coefficients; expected the plan's {plan.num_gpus} GPUs and at least one set"
        )
    popularity = np.stack(
        [np.bincount(layer.ravel(), minlength=plan.num_experts) for layer in experts_TLK.swapaxes(0, 1)]
    )
    loads = layer_loads(plan.slots, popularity)
    exact = None if plan.has_copies else _exact_sums(plan, experts_TLK)
    by_batch_size = {}
    for batch_size in batch_sizes:
        draws = np.random.default_rng(seed).integers(len(experts_TLK), size=(batches, batch_size))
        sums = _Sums()
        for start in range(0, batches, max(1, TOKENS_AT_ONCE // batch_size)):
            tokens_NB = draws[start : start + max(1, TOKENS_AT_ONCE // batch_size)]
            _replay(plan, cluster, experts_TLK[tokens_NB], sums, count_tokens=exact is None)
        by_batch_size[batch_size] = _means(sums, exact or sums, experts_TLK.shape[1:])
    return Metrics(float(loads.mean()), float(loads.max()), by_batch_size)


def _exact_sums(plan: PlacementPlan, experts_TLK: NDArray[np.integer]) -> _Sums:
    """Sums over all tokens, which a plan without copies serves the same way in every step."""
    sums = _Sums(tokens=len(experts_TLK))
    for start in range(0, len(experts_TLK), TOKENS_AT_ONCE):
        part = experts_TLK[start : start + TOKENS_AT_ONCE]
        previous: tuple[NDArray[np.int16], NDArray[np.integer]] | None = None
        for layer in range(plan.num_layers):
            gpus = plan.copies(layer)[:, 0][part[:, layer].astype(np.intp)]
            previous = _count_tokens(gpus, plan.num_gpus, previous, sums)
    return sums


def _replay(
    plan: PlacementPlan, cluster: Cluster, experts_NBLK: NDArray[np.integer], sums: _Sums, count_tokens: bool
) -> None:
    """Replay steps through all layers and add them to the sums."""
    num_steps, batch_size, num_layers, _ = experts_NBLK.shape
    coefficients = cluster.coefficients[0]
    sums.steps += num_steps
    sums.tokens += num_steps * batch_size if count_tokens else 0
    previous: tuple[NDArray[np.int16], NDArray[np.integer]] | None = None
    home: NDArray[np.integer] = np.broadcast_to(np.arange(batch_size) % plan.num_gpus, (num_steps, batch_size))
    for layer in range(num_layers):
        experts_NBK = experts_NBLK[:, :, layer]
        copies = plan.copies(layer)
        counts_NE = _count_experts(experts_NBK, plan.num_experts)
        chosen_NE = level_dispatch_steps(counts_NE, copies, plan.num_gpus, plan.dispatch.split_above_tokens)
        gpus_NBK = _pair_gpus(experts_NBK, counts_NE, chosen_NE, copies)
        active_NG = _active_per_gpu(chosen_NE, copies, plan.num_gpus)
        pairs_NG = _count_experts(gpus_NBK, plan.num_gpus)
        least_N = -(-(counts_NE > 0).sum(axis=1) // plan.num_gpus)
        sums.active_ratio += float((active_NG.max(axis=1) / least_N).sum())
        sums.expert_us += float(expert_us(active_NG, pairs_NG, coefficients).sum())
        sums.exchange_us += _exchange_us(plan, cluster, gpus_NBK, home)
        if plan.workload.exchange == "coherent":
            home = gpus_NBK[:, :, 0].astype(np.intp)
        if count_tokens:
            previous = _count_tokens(gpus_NBK.reshape(-1, gpus_NBK.shape[2]), plan.num_gpus, previous, sums)


def _count_experts(experts_NBK: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    """Token–expert pairs per step and expert (or GPU): [N, size]."""
    num_steps = len(experts_NBK)
    keys = np.arange(num_steps)[:, None] * size + experts_NBK.reshape(num_steps, -1)
    return np.bincount(keys.ravel(), minlength=num_steps * size).reshape(num_steps, size)


def _pair_gpus(
    experts_NBK: NDArray[np.integer],
    counts_NE: NDArray[np.integer],
    chosen_NE: NDArray[np.integer],
    copies: NDArray[np.integer],
) -> NDArray[np.int32]:
    """GPU of every token–expert pair, [N, B, K]; a split expert's pairs go to its copies in equal runs."""
    flat: NDArray[np.intp] = experts_NBK.reshape(len(experts_NBK), -1).astype(np.intp)
    gpus = np.take_along_axis(chosen_NE, flat, axis=1).astype(np.int32)
    for expert in np.flatnonzero((chosen_NE == SPLIT).any(axis=0)):
        rows = np.flatnonzero(chosen_NE[:, expert] == SPLIT)
        mine = flat[rows] == expert
        rank = np.cumsum(mine, axis=1) - 1
        holders = copies[expert][copies[expert] >= 0]
        target = holders[(rank * len(holders) // counts_NE[rows, expert][:, None]) * mine]
        gpus[rows] = np.where(mine, target, gpus[rows])
    shaped: NDArray[np.int32] = gpus.reshape(experts_NBK.shape)
    return shaped


def _active_per_gpu(chosen_NE: NDArray[np.integer], copies: NDArray[np.integer], num_gpus: int) -> NDArray[np.int64]:
    """Active experts per step and GPU, [N, G]; a split expert is active on every GPU with a copy."""
    num_steps = len(chosen_NE)
    step, expert = np.nonzero(chosen_NE >= 0)
    keys = step * num_gpus + chosen_NE[step, expert]
    active = np.bincount(keys, minlength=num_steps * num_gpus).reshape(num_steps, num_gpus)
    holds = np.zeros((len(copies), num_gpus), dtype=np.int64)
    for expert_id, gpus in enumerate(copies):
        holds[expert_id, gpus[gpus >= 0]] = 1
    return active + (chosen_NE == SPLIT).astype(np.int64) @ holds


def _exchange_us(
    plan: PlacementPlan, cluster: Cluster, gpus_NBK: NDArray[np.integer], home_NB: NDArray[np.integer]
) -> float:
    """Time of one layer's exchanges, summed over steps.

    ``alltoall``: token i lives on GPU i mod G; its hidden state goes once to every other GPU that serves it, and comes
    back. ``coherent``: it lives where its first choice of the layer before was served, and the results meet where its
    first choice of this layer is. Both first gather the routes.
    """
    num_steps, batch_size, top_k = gpus_NBK.shape
    hidden = cluster.coefficients[0].hidden_state_bytes
    if plan.num_gpus == 1:
        return 0.0
    if plan.workload.exchange == "allreduce":
        return num_steps * allreduce_us(cluster, batch_size, hidden)
    serves_NBG = (gpus_NBK[..., None] == np.arange(plan.num_gpus)).any(axis=2)
    dispatch_NGG = _rows_between(home_NB, serves_NBG)
    returns_to = gpus_NBK[:, :, 0] if plan.workload.exchange == "coherent" else home_NB
    combine_NGG = _rows_between(returns_to, serves_NBG).swapaxes(1, 2)
    exchanges = traffic_us(cluster, dispatch_NGG, hidden) + traffic_us(cluster, combine_NGG, hidden)
    return float(exchanges.sum()) + num_steps * gather_routes_us(cluster, batch_size, top_k)


def _rows_between(home_NB: NDArray[np.integer], serves_NBG: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Hidden states between each home GPU and each serving GPU, [N, G, G]."""
    num_gpus = serves_NBG.shape[2]
    lives_NBG = home_NB[..., None] == np.arange(num_gpus)
    rows = np.matmul(lives_NBG.swapaxes(1, 2).astype(np.float32), serves_NBG.astype(np.float32))
    return rows.astype(np.int64)


def _count_tokens(
    gpus_TK: NDArray[np.integer],
    num_gpus: int,
    previous: tuple[NDArray[np.int16], NDArray[np.integer]] | None,
    sums: _Sums,
) -> tuple[NDArray[np.int16], NDArray[np.integer]]:
    """Add a layer's distinct GPUs, and the pairs kept since the layer before; what the next layer needs of this one."""
    choices_TG = (gpus_TK[:, :, None] == np.arange(num_gpus)).sum(axis=1, dtype=np.int16)
    sums.gpus += int((choices_TG > 0).sum())
    if previous is not None:
        sums.pairs_kept += int((choices_TG * previous[0]).sum(dtype=np.int64))
        sums.top1_kept += int((gpus_TK[:, 0] == previous[1]).sum())
    return choices_TG, gpus_TK[:, 0]


def _means(steps: _Sums, tokens: _Sums, layers_and_choices: tuple[int, ...]) -> BatchMetrics:
    """Means from the sums over steps and those over tokens."""
    num_layers, top_k = layers_and_choices
    transitions = tokens.tokens * (num_layers - 1)
    return BatchMetrics(
        step_us=(steps.expert_us + steps.exchange_us) / steps.steps,
        active_ratio=steps.active_ratio / (steps.steps * num_layers),
        gpus_per_token=tokens.gpus / (tokens.tokens * num_layers),
        pair_locality=tokens.pairs_kept / (transitions * top_k**2) if transitions else 1.0,
        top1_transition_locality=tokens.top1_kept / transitions if transitions else 1.0,
        expert_us=steps.expert_us / steps.steps,
        exchange_us=steps.exchange_us / steps.steps,
    )
