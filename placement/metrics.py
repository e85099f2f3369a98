"""What a plan is judged by: the metrics, by name, and the parts of them that need no replay.

Shape suffixes: N steps, S sequences, R resamples, L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.slots import Slots


@dataclass(frozen=True)
class BatchMetrics:
    """Metrics that depend on the number of tokens per step.

    Attributes:
        step_us: mean time of a step's MoE layers in µs, by the cost model (``placement.cost``).
        active_ratio: mean over steps and layers of the busiest GPU's active experts / ceil(distinct experts / GPUs).
        gpus_per_token: mean over tokens and layers of the distinct GPUs that serve a token.
        pair_locality: share of all K×K choice pairs of adjacent layers that are served on one GPU.
        top1_transition_locality: the same of the first choices alone.
        expert_us, exchange_us: the two parts of ``step_us``.
        nvlink_bytes, network_bytes: mean bytes of hidden states that a step sends within nodes and between nodes, over
            all GPUs, layers and both exchanges.

    The token metrics (GPUs per token and both localities) need the copies that the dispatch rule chooses; without
    copies they are the same for every batch size and exact over all tokens. With one layer there are no transitions:
    both localities are 1.
    """

    step_us: float
    active_ratio: float
    gpus_per_token: float
    pair_locality: float
    top1_transition_locality: float
    expert_us: float
    exchange_us: float
    nvlink_bytes: float
    network_bytes: float


@dataclass(frozen=True)
class TokenSums:
    """Sums of the token metrics by sequence, from which they can be computed for resampled sequences as well.

    Attributes:
        tokens: int64 [S], tokens replayed, a token as often as it was drawn.
        gpus: int64 [S], distinct GPUs per token and layer.
        pairs_kept, top1_kept: int64 [S], choice pairs of adjacent layers on one GPU, and first choices alone.
        num_layers, top_k: L and K, which the means divide by.
    """

    tokens: NDArray[np.int64]
    gpus: NDArray[np.int64]
    pairs_kept: NDArray[np.int64]
    top1_kept: NDArray[np.int64]
    num_layers: int
    top_k: int

    def means(self, weights_RS: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
        """``gpus_per_token``, ``pair_locality`` and ``top1_transition_locality``, float64 [R, 3].

        Args:
            weights_RS: [R, S], how often each resample holds each sequence; None for all once (R = 1). A resample
                needs at least one token.
        """
        weights = np.ones((1, len(self.tokens)), dtype=np.int64) if weights_RS is None else weights_RS
        tokens = weights @ self.tokens
        transitions = tokens * (self.num_layers - 1)
        found = np.ones((len(weights), 3))
        found[:, 0] = weights @ self.gpus / (tokens * self.num_layers)
        if self.num_layers > 1:
            found[:, 1] = weights @ self.pairs_kept / (transitions * self.top_k**2)
            found[:, 2] = weights @ self.top1_kept / transitions
        return found


@dataclass(frozen=True)
class BatchSamples:
    """What the means of one batch size are made of, for bootstrap intervals.

    Attributes:
        step_us, active_ratio: float64 [N], per drawn step; its tokens are independent of other steps', and the same
            for every plan that is judged with the same seed and tokens.
        token_sums: by sequence; S = 1 where no sequence ids were given.
    """

    step_us: NDArray[np.float64]
    active_ratio: NDArray[np.float64]
    token_sums: TokenSums


@dataclass(frozen=True)
class Metrics:
    """Metrics of one plan on one set of tokens.

    Attributes:
        load_mean, load_max: over layers, the busiest GPU's token–expert pairs / the mean GPU's, where an expert's
            pairs are shared evenly by its copies.
        by_batch_size: metrics per number of tokens in a step.
        samples: what the means in ``by_batch_size`` are made of.
        sequence_loads: float64 [S, L, G], every sequence's token–expert pairs per GPU, shared as for ``load_mean``;
            None where no sequence ids were given. Sequences stand in the order of their ids, in ``samples`` too.
    """

    load_mean: float
    load_max: float
    by_batch_size: Mapping[int, BatchMetrics]
    samples: Mapping[int, BatchSamples] = field(default_factory=dict, repr=False, compare=False)
    sequence_loads: NDArray[np.float64] | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Metrics by name; those that depend on the batch size as objects keyed by it."""
        document: dict[str, Any] = {"load_mean": self.load_mean, "load_max": self.load_max}
        for metric in fields(BatchMetrics):
            document[metric.name] = {
                str(size): getattr(metrics, metric.name) for size, metrics in self.by_batch_size.items()
            }
        return document


def copy_weights(slots: Slots, num_experts: int) -> NDArray[np.float64]:
    """Share of an expert's tokens that each GPU serves when copies share evenly: [L, G, E], 1 / copies or 0."""
    weights = np.zeros((len(slots), len(slots[0]), num_experts))
    for layer, gpus in enumerate(slots):
        for gpu, experts in enumerate(gpus):
            weights[layer, gpu, list(experts)] = 1.0
    return weights / weights.sum(axis=1, keepdims=True)


def layer_loads(slots: Slots, loads: NDArray[np.integer]) -> NDArray[np.float64]:
    """Busiest GPU's load / mean GPU's load, float64 [L]; 1 in a layer without any load.

    Args:
        slots: a placement.
        loads: [L, E], token–expert pairs.
    """
    per_gpu = np.einsum("lge,le->lg", copy_weights(slots, loads.shape[1]), loads)
    mean = loads.sum(axis=1) / len(slots[0])
    return np.divide(per_gpu.max(axis=1), mean, out=np.ones(len(slots)), where=mean > 0)


def even_locality(slots: Slots, transitions: NDArray[np.integer]) -> float:
    """Share of transitions that stay on a GPU when copies share evenly and independently; 1 without transitions.

    Args:
        slots: a placement.
        transitions: [L-1, E, E], transitions from expert a of layer l to expert b of layer l+1.
    """
    total = transitions.sum()
    if not total:
        return 1.0
    weights = copy_weights(slots, transitions.shape[-1])
    stay = np.einsum("lga,lab,lgb->", weights[:-1], transitions, weights[1:], optimize=True)
    return float(stay / total)
