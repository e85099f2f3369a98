"""Routing and permutation in one launch where a step has few tokens: a launch costs more than the work.

Shape legend: T tokens, E logical experts, K choices per token, P local slots.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.permute import Permutation, permute
from kernels.route import Routes, route
from kernels.route.reference import Scoring

__all__ = ["route_permute"]

MOST_COMPARISONS = 4096  # of pairs with pairs and with slots, by one program; with more, two launches are faster


def route_permute(logits: torch.Tensor, num_slots: int, *, top_k: int, **scoring: Any) -> tuple[Routes, Permutation]:
    """What `route` and then `permute` of its slots give, bit for bit.

    Args:
        logits: what the router gives, bfloat16, float16 or float32 ``[T, E]``.
        num_slots: slots of this rank P.
        top_k: choices per token K.
        scoring: the other arguments of `route`.

    Returns:
        The routes, and the pairs of every slot.

    Raises:
        OperatorError: as in `route`.
    """
    pairs = logits.shape[0] * top_k
    if logits.is_cuda and 0 < pairs * max(pairs, num_slots) <= MOST_COMPARISONS:
        from kernels.route_permute.kernel import route_permute_triton

        slot_of_expert = scoring.pop("slot_of_expert", None)
        return route_permute_triton(logits, num_slots, Scoring(top_k, **scoring), slot_of_expert)
    routes = route(logits, top_k=top_k, **scoring)
    return routes, permute(routes.slots, num_slots)
