"""Triton kernel of routing and permutation: one program for all tokens of a small step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.launch import overlap, power_of_two
from kernels.permute.kernel import empty_permutation
from kernels.permute.reference import Permutation
from kernels.route.choose import choose
from kernels.route.kernel import empty_routes, scoring_constants
from kernels.route.reference import Routes, Scoring


@triton.jit
def route_permute_kernel(
    logits,
    bias,
    slot_of_expert,
    ids,
    slots,
    weights,
    order,
    indptr,
    num_tokens,
    num_experts,
    num_slots,
    row_stride,
    scale,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Route all tokens; a pair's place is the number of pairs that come before it."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slots_TK = choose(
        logits,
        bias,
        slot_of_expert,
        ids,
        slots,
        weights,
        0,
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
        BLOCK_T,
        BLOCK_E,
        BLOCK_K,
    )
    tokens = tl.arange(0, BLOCK_T)[:, None]
    choices = tl.arange(0, BLOCK_K)[None, :]
    here_TK = (tokens < num_tokens) & (choices < TOP_K) & (slots_TK >= 0)
    BLOCK_N: tl.constexpr = BLOCK_T * BLOCK_K
    keys_TK = tl.where(here_TK, slots_TK, num_slots) * BLOCK_N + tokens * BLOCK_K + choices
    keys_N = tl.reshape(keys_TK, [BLOCK_N])  # ascending as the pairs have to be: by slot, then by pair
    places_N = tl.sum((keys_N[None, :] < keys_N[:, None]).to(tl.int32), 1)
    position_N = keys_N % BLOCK_N
    pairs_N = position_N // BLOCK_K * TOP_K + position_N % BLOCK_K
    tl.store(order + places_N, pairs_N, mask=keys_N < num_slots * BLOCK_N)
    bounds = tl.arange(0, BLOCK_P)
    before_P = tl.sum((keys_N[None, :] < bounds[:, None] * BLOCK_N).to(tl.int32), 1)
    tl.store(indptr + bounds, before_P, mask=bounds <= num_slots)


def route_permute_triton(
    logits: torch.Tensor, num_slots: int, scoring: Scoring, slot_of_expert: torch.Tensor | None = None
) -> tuple[Routes, Permutation]:
    """What `route_permute` computes for a step with at least one token and few pairs."""
    tokens, experts = logits.shape
    routes = empty_routes(logits, scoring.top_k)
    permutation = empty_permutation(tokens * scoring.top_k, num_slots, logits.device)
    route_permute_kernel[(1,)](
        logits,
        scoring.bias,
        slot_of_expert,
        *routes,
        *permutation,
        tokens,
        experts,
        num_slots,
        logits.stride(0),
        scoring.scale,
        **scoring_constants(scoring, experts),
        BLOCK_T=power_of_two(tokens),
        BLOCK_P=power_of_two(num_slots + 1),
        num_warps=min(power_of_two(tokens), 8),  # a reduction over experts then stays within a warp
        **overlap(logits),
    )
    return routes, permutation
