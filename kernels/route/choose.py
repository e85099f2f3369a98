"""Triton function that chooses the experts of a block of tokens, shared by the kernels that route.

Shape legend: T tokens of the block, E experts padded to a power of two, K choices padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Not scores, but below every score: of a NaN, of an expert outside of the chosen groups, of padding.
NAN = tl.constexpr(-1e30)
OTHER_GROUP = tl.constexpr(-2e30)
PADDING = tl.constexpr(-3e30)
CHOSEN = tl.constexpr(-(2**31))  # below the key of every number


@triton.jit
def ordered_bits(values):
    """Integers in the order of float32 values: a warp finds the greatest integer in one instruction."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def keep_top_groups(
    choice_TE, experts, num_experts, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr
):
    """Put the experts of all groups but each token's best behind all others."""
    group_of_expert = experts // (num_experts // GROUPS)
    kept_TE = choice_TE < PADDING * 2
    scores_TE = tl.full(choice_TE.shape, PADDING, tl.float32)  # of an expert's group
    for group in tl.static_range(GROUPS):
        inside_TE = (group_of_expert == group)[None, :] & (experts < num_experts)[None, :]
        members_TE = tl.where(inside_TE, choice_TE, PADDING)
        best, where = tl.max(members_TE, 1, return_indices=True, return_indices_tie_break_left=True)
        if TOP2:
            rest_TE = tl.where(experts[None, :] == where[:, None], PADDING, members_TE)
            best += tl.max(rest_TE, 1)
        scores_TE = tl.where(inside_TE, best[:, None], scores_TE)
    for _ in tl.static_range(TOP_GROUPS):
        best, where = tl.max(scores_TE, 1, return_indices=True, return_indices_tie_break_left=True)
        picked_TE = group_of_expert[None, :] == (where // (num_experts // GROUPS))[:, None]
        kept_TE = kept_TE | picked_TE
        scores_TE = tl.where(picked_TE, -float("inf"), scores_TE)
    return tl.where(kept_TE, choice_TE, OTHER_GROUP)


@triton.jit
def choose(
    logits,
    bias,
    slot_of_expert,
    ids,
    slots,
    weights,
    first_token,
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
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ids, slots and weights of the block's tokens; returns the slots ``[T, K]``, undefined outside."""
    tokens = first_token + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    real_TE = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    offsets_TE = tokens.to(tl.int64)[:, None] * row_stride + experts[None, :]
    x_TE = tl.load(logits + offsets_TE, mask=real_TE, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores_TE = 1 / (1 + tl.exp(-x_TE))
    else:
        raised_TE = tl.exp(x_TE - tl.max(x_TE, 1)[:, None])
        scores_TE = raised_TE / tl.sum(raised_TE, 1)[:, None]
    choice_TE = scores_TE
    if bias is not None:
        choice_TE += tl.load(bias + experts, mask=experts < num_experts, other=0.0)[None, :]
    choice_TE = tl.where(choice_TE == choice_TE, choice_TE, NAN)
    if GROUPS > 1:
        choice_TE = keep_top_groups(choice_TE, experts, num_experts, GROUPS, TOP_GROUPS, TOP2)
    choice_TE = tl.where((experts < num_experts)[None, :], choice_TE, PADDING)

    keys_TE = ordered_bits(choice_TE)
    choices = tl.arange(0, BLOCK_K)
    ids_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    weights_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for choice in tl.static_range(TOP_K):
        key = tl.max(keys_TE, 1)
        best = tl.min(tl.where(keys_TE == key[:, None], experts[None, :], BLOCK_E), 1)
        chosen_TE = experts[None, :] == best[:, None]
        if bias is None:
            weight = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
            weight = tl.where(weight == NAN, float("nan"), weight)
        else:
            weight = tl.sum(tl.where(chosen_TE, scores_TE, 0.0), 1)
        keys_TE = tl.where(chosen_TE, CHOSEN, keys_TE)
        ids_TK = tl.where((choices == choice)[None, :], best[:, None], ids_TK)
        weights_TK = tl.where((choices == choice)[None, :], weight[:, None], weights_TK)
    if RENORMALISE:
        weights_TK = weights_TK / (tl.sum(weights_TK, 1)[:, None] + 1e-20)

    real_TK = (tokens < num_tokens)[:, None] & (choices < TOP_K)[None, :]
    out_TK = tokens.to(tl.int64)[:, None] * TOP_K + choices[None, :]
    slots_TK = ids_TK
    if slot_of_expert is not None:
        slots_TK = tl.load(slot_of_expert + ids_TK, mask=real_TK, other=-1)
    tl.store(ids + out_TK, ids_TK, mask=real_TK)
    tl.store(slots + out_TK, slots_TK, mask=real_TK)
    tl.store(weights + out_TK, weights_TK * scale, mask=real_TK)
    return slots_TK
