"""Plain-torch reference of routing, and what it is described by.

Shape legend: T tokens, E logical experts, K choices per token, N groups of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

NAN, OTHER_GROUP = -1e30, -2e30  # below every score, and ordered: what is chosen when nothing else is left
SMALLEST_SUM = 1e-20  # a renormalising sum is never zero


class Routes(NamedTuple):
    """Each token's choices, by falling score.

    Attributes:
        ids: logical experts, int32 ``[T, K]``.
        slots: where they stand on this rank, int32 ``[T, K]``, -1 where not here.
        weights: float32 ``[T, K]``.
    """

    ids: torch.Tensor
    slots: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Scoring:
    """The arguments of `route` that a family of models fixes, as explained there."""

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    bias: torch.Tensor | None = None
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


def route_reference(logits: torch.Tensor, scoring: Scoring, slot_of_expert: torch.Tensor | None = None) -> Routes:
    """What `route` computes, on any device; the same arguments and results."""
    wide = logits.float()
    scores_TE = wide.softmax(1) if scoring.scoring == "softmax" else wide.sigmoid()
    choice_TE = scores_TE if scoring.bias is None else scores_TE + scoring.bias
    choice_TE = choice_TE.masked_fill(choice_TE.isnan(), NAN)
    if scoring.num_groups > 1:
        choice_TE = _keep_top_groups(choice_TE, scoring)
    ids_TK = choice_TE.sort(dim=1, descending=True, stable=True).indices[:, : scoring.top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if scoring.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + SMALLEST_SUM)
    slots_TK = ids_TK.int() if slot_of_expert is None else slot_of_expert[ids_TK]
    return Routes(ids_TK.int(), slots_TK, weights_TK * scoring.scale)


def _keep_top_groups(choice_TE: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Put the experts of all groups but each token's best behind all others."""
    groups = choice_TE.unflatten(1, (scoring.num_groups, -1))
    best = groups.topk(2 if scoring.group_score == "top2_sum" else 1, dim=2).values.sum(2)
    chosen = best.sort(dim=1, descending=True, stable=True).indices[:, : scoring.top_groups]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
    return groups.masked_fill(~kept[:, :, None], OTHER_GROUP).flatten(1)
