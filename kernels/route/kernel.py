"""Triton kernel of routing: one program per token."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two
from kernels.route.choose import choose
from kernels.route.reference import Routes, Scoring


@triton.jit
def route_kernel(
    logits,
    bias,
    slot_of_expert,
    ids,
    slots,
    weights,
    num_tokens,
    num_experts,
    row_stride,
    scale,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Route the program's token."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    choose(
        logits,
        bias,
        slot_of_expert,
        ids,
        slots,
        weights,
        tl.program_id(0),
        num_tokens,
        num_experts,
        row_stride,
        scale,
        TOP_K,
        SIGMOID,
        RENORMALISE,
        GROUPS,
        TOP_GROUPS,
        TOP2,
        1,
        BLOCK_E,
        BLOCK_K,
    )


def scoring_constants(scoring: Scoring, num_experts: int) -> dict[str, Any]:
    """The compile-time arguments of `choose` but its block of tokens."""
    return {
        "TOP_K": scoring.top_k,
        "SIGMOID": scoring.scoring == "sigmoid",
        "RENORMALISE": scoring.renormalise,
        "GROUPS": scoring.num_groups,
        "TOP_GROUPS": scoring.top_groups,
        "TOP2": scoring.group_score == "top2_sum",
        "BLOCK_E": power_of_two(num_experts),
        "BLOCK_K": power_of_two(scoring.top_k),
    }


def empty_routes(logits: torch.Tensor, top_k: int) -> Routes:
    """Routes to be filled by a kernel."""
    shape = (logits.shape[0], top_k)
    ids, slots = (torch.empty(shape, dtype=torch.int32, device=logits.device) for _ in range(2))
    return Routes(ids, slots, torch.empty(shape, dtype=torch.float32, device=logits.device))


def route_triton(logits: torch.Tensor, scoring: Scoring, slot_of_expert: torch.Tensor | None = None) -> Routes:
    """What `route` computes; the same arguments and results."""
    tokens, experts = logits.shape
    routes = empty_routes(logits, scoring.top_k)
    if tokens:
        route_kernel[(tokens,)](
            logits,
            scoring.bias,
            slot_of_expert,
            *routes,
            tokens,
            experts,
            logits.stride(0),
            scoring.scale,
            **scoring_constants(scoring, experts),
            num_warps=1,
            **overlap(logits),
        )
    return routes
