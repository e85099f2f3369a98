"""Routing: from a router's logits to each token's experts, their slots on this rank and their weights.

Shape legend: T tokens, E logical experts, K choices per token.
"""

from __future__ import annotations

from typing import Literal

import torch

from kernels.errors import OperatorError
from kernels.route.reference import Routes, Scoring, route_reference

__all__ = ["Routes", "route", "route_reference"]


def route(
    logits: torch.Tensor,
    *,
    top_k: int,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    renormalise: bool,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: Literal["max", "top2_sum"] = "max",
    slot_of_expert: torch.Tensor | None = None,
) -> Routes:
    """Choose K experts per token by falling score; of equal scores the lower id.

    Mixtral, Qwen3-MoE: softmax, renormalised (gpt-oss's softmax over the chosen is the same). Qwen2-MoE, OLMoE:
    softmax. DeepSeek-V2: softmax, groups by their best expert, scaled. DeepSeek-V3: sigmoid, a bias that only chooses,
    groups by their two best, renormalised, scaled.

    Args:
        logits: what the router gives, bfloat16, float16 or float32 ``[T, E]``.
        top_k: choices per token K.
        scoring: what turns logits into scores.
        renormalise: divide the chosen scores by their sum.
        scale: then multiply them by this.
        bias: added to the scores to choose, and not in the weights; float32 ``[E]``.
        num_groups: equal runs of neighbouring experts.
        top_groups: only so many groups may be chosen from.
        group_score: a group counts as its greatest score, or as the sum of its two greatest.
        slot_of_expert: the local slot of every expert, int32 ``[E]``, -1 where this rank has none; None where slots
            are experts.

    Returns:
        `Routes`. A token with a NaN among its logits gets K different experts and NaN weights.

    Raises:
        OperatorError: fewer experts than choices, or groups of unequal size.
    """
    rule = Scoring(top_k, scoring, renormalise, scale, bias, num_groups, top_groups, group_score)
    experts = logits.shape[1]
    if not top_k <= experts // num_groups * top_groups:
        raise OperatorError(
            f"top-{top_k} of {experts} experts in {top_groups} of {num_groups} groups: there "
            "are not as many experts to choose; lower top_k or raise top_groups"
        )
    if experts % num_groups:
        raise OperatorError(f"{experts} experts do not divide into {num_groups} groups; use a divisor")
    if logits.is_cuda:
        from kernels.route.kernel import route_triton

        return route_triton(logits, rule, slot_of_expert)
    return route_reference(logits, rule, slot_of_expert)
