"""Everything that ``stats`` and ``report`` show of a trace, gathered in one object.

Shape suffixes: L layers, E experts, B batch sizes, D domains, W windows, N sample sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.statistics import RoutingStatistics


@dataclass(frozen=True)
class ProfiledSource:
    """What was profiled.

    Attributes:
        path: file name of the trace or counts.
        model: hub id or path of the model.
        source: where the routes come from, or None.
        layer_ids: decoder layers that are MoE layers (L).
        num_experts: E.
        top_k: experts per token and layer, or None where only counts are there.
        num_tokens: tokens, or None where only counts are there.
        num_sequences: sequences, or None where only counts are there.
    """

    path: str
    model: str
    source: str | None
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int | None
    num_tokens: int | None
    num_sequences: int | None


@dataclass(frozen=True)
class Information:
    """Mutual information between the experts of adjacent layers, in bits, float64 ``[L-1]`` each.

    Attributes:
        pairs: over all K x K pairs of choices.
        pairs_shuffled: the same after the tokens of the next layer were shuffled: what chance alone gives.
        top1: between first choices.
        top1_shuffled: the same, shuffled.
    """

    pairs: np.ndarray
    pairs_shuffled: np.ndarray
    top1: np.ndarray
    top1_shuffled: np.ndarray


@dataclass(frozen=True)
class ActiveExperts:
    """Expected distinct experts of a batch of tokens drawn independently, with replacement.

    Attributes:
        batch_sizes: B tokens per batch.
        mixed: float64 ``[B, L]``, tokens drawn from all that were counted.
        same_domain: float64 ``[B, L]``, all tokens of a batch from one domain, domains by their share of tokens;
            None where the trace names fewer than two domains.
        uniform: float64 ``[B]``, if every expert were chosen equally often.
        phase: whose tokens: ``decode`` where the trace has decode steps, else ``prefill``.
    """

    batch_sizes: tuple[int, ...]
    mixed: np.ndarray
    same_domain: np.ndarray | None
    uniform: np.ndarray
    phase: str


@dataclass(frozen=True)
class Convergence:
    """How far the affinity of the first n tokens (in a random order of sequences) is from that of all others.

    Attributes:
        tokens: n, int64 ``[N]``, rising.
        distance: float64 ``[N]``, total variation between P(next expert | expert) of the n tokens and of the tokens
            not among them, weighted by popularity, mean over layers; 0 is equal, 1 is disjoint.
        floor: what remains at the largest n.
        stable_at: the first n whose distance is within 0.05 of the floor.
    """

    tokens: np.ndarray
    distance: np.ndarray
    floor: float
    stable_at: int

    @property
    def may_come_later(self) -> bool:
        """Whether fewer than three doublings followed ``stable_at``: the floor of a longer trace may be lower."""
        return 8 * self.stable_at > self.tokens[-1]


@dataclass(frozen=True)
class Drift:
    """How popularity differs between groups of sequences: total variation, mean over layers.

    Attributes:
        names: of the groups (domains, or windows of time).
        tokens: int64 ``[D]``, tokens of each group.
        distance: float64 ``[D, D]``, symmetric; 0 is equal, 1 is disjoint.
        to_all: float64 ``[D]``, from each group to the whole trace.
        to_all_control: float64 ``[D]``, the same for groups of as many sequences put together at random.
    """

    names: tuple[str, ...]
    tokens: np.ndarray
    distance: np.ndarray
    to_all: np.ndarray
    to_all_control: np.ndarray


@dataclass(frozen=True)
class LocalityPotential:
    """Transitions between adjacent layers that stay on one of so many GPUs, one copy of each expert, equal slots.

    Placed by the affinity of even sequences and judged on odd ones.

    Attributes:
        num_gpus: G.
        kept: share of pairs kept on one GPU when experts are placed by affinity.
        contiguous: the same when expert e is on GPU e // (E / G).
        max_load: busiest GPU's pairs / mean, worst layer, of the placement by affinity.
    """

    num_gpus: int
    kept: float
    contiguous: float
    max_load: float


@dataclass(frozen=True)
class PredictorScore:
    """How well one predictor tells a layer's experts before its router has run, on sequences it did not learn from.

    Attributes:
        predictor: its name, such as ``path-3``.
        description: what it predicts from, in a few words.
        layer_ids: decoder layers that it was judged on (M of them).
        hit_rate: float64 ``[M]``, share of a token's K experts that are among the K predicted.
        top1_hit_rate: float64 ``[M]``, share of tokens whose first choice is the first predicted.
        batch_accuracy: float64 ``[M]`` or None: share of the 2K most popular experts of a batch that the estimate has
            among its 2K most popular. None where a layer has no more than 2K.
        replan_rate: float64 ``[M]`` or None: share of batches whose set of the 2K most popular differs.
        paper: what the paper reports, in a few words, or None.
        hit_rate_at: float64 ``[M, K]``, share of a token's first k choices that are among the first k predicted, for
            k = 1 to K; None where only the two rates above are known.
        backed_off: float64 ``[M]`` or None: share of tokens for which less than the whole context had to do, since the
            whole had not been seen.
        batch_tokens: tokens of each batch, or None.
        learned_tokens, judged_tokens: tokens learned from and judged on; fewer than the trace has where it is sampled.
    """

    predictor: str
    description: str
    layer_ids: tuple[int, ...]
    hit_rate: np.ndarray
    top1_hit_rate: np.ndarray
    batch_accuracy: np.ndarray | None
    replan_rate: np.ndarray | None
    paper: str | None
    hit_rate_at: np.ndarray | None = None
    backed_off: np.ndarray | None = None
    batch_tokens: int | None = None
    learned_tokens: int = 0
    judged_tokens: int = 0


@dataclass(frozen=True)
class RoutingProfile:
    """A trace, or a file of counts, explained; what the source cannot tell is None.

    Attributes:
        source: what was profiled.
        popularity: int64 ``[L, E]``.
        popularity_by_phase: int64 ``[L, E]`` by ``prefill`` and ``decode``, those that have tokens.
        popularity_by_domain: int64 ``[L, E]`` by domain, in the order of first appearance; empty without domains.
        tokens_by_phase, tokens_by_domain: tokens of each.
        statistics: all counts; None where only counts per expert are there. The fields below need it as well.
        information: None with one layer.
        active: expected active experts by batch size.
        convergence: None with one layer or too few tokens.
        domain_drift: None with fewer than two domains.
        time_drift: between consecutive windows of equal token counts; None with too few sequences.
        potentials: locality that placement by affinity can keep, by number of GPUs that divides E.
        predictors: empty where they were not asked for.
    """

    source: ProfiledSource
    popularity: np.ndarray
    popularity_by_phase: dict[str, np.ndarray]
    popularity_by_domain: dict[str, np.ndarray]
    tokens_by_phase: dict[str, int]
    tokens_by_domain: dict[str, int]
    statistics: RoutingStatistics | None
    information: Information | None
    active: ActiveExperts | None
    convergence: Convergence | None
    domain_drift: Drift | None
    time_drift: Drift | None
    potentials: tuple[LocalityPotential, ...]
    predictors: tuple[PredictorScore, ...]
