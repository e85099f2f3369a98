"""Attention of prompt tokens over their own and all earlier keys in the paged cache, sequence by sequence.

Shape legend: N sequences, L new tokens of each, S tokens of each in the cache after them, H query heads, G kv heads,
d head size, v size of a value.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

QUERY_BLOCK = 1024  # queries whose mask is made at once
EXPANDED = 1 << 26  # keys' numbers that are repeated for the query heads at once
ALIGNMENT = 8  # fused attention wants head sizes in multiples of this


def prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend causally from each sequence's last L tokens to all of its S tokens.

    Args:
        q: queries ``[N, L, H, d]``.
        k: keys ``[N, S, G, d]``.
        v: values ``[N, S, G, v]``.
        scale: factor of the scores.
        window: attend to the last so many tokens alone, the query's own included; None to all.
        sinks: a score per head that takes part in the softmax without a value, ``[H]``; None for none.

    Returns:
        ``[N, L, H, v]``.
    """
    group = q.shape[2] // k.shape[2]
    at_once = max(1, EXPANDED // (k[:, :, 0].numel() * group))  # kv heads
    attended = []
    for first in range(0, k.shape[2], at_once):
        shared, own = slice(first, first + at_once), slice(first * group, (first + at_once) * group)
        heads = q[:, :, own], k[:, :, shared], v[:, :, shared]
        attended.append(_attend(*heads, scale, window, None if sinks is None else sinks[own]))
    return torch.cat(attended, dim=2)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """`prefill_attention` of some heads at once."""
    group = q.shape[2] // k.shape[2]
    value_size, new, total = v.shape[3], q.shape[1], k.shape[1]
    queries = q.transpose(1, 2)
    keys, values = (tensor.transpose(1, 2).repeat_interleave(group, dim=1) for tensor in (k, v))
    if sinks is not None:
        queries, keys, values = _with_sinks(queries, keys, values, sinks / scale)
    if window is None and new == total and sinks is None:
        attended = scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale)
        return attended.transpose(1, 2)
    blocks = []
    for start in range(0, new, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, new)
        seen = total - new + stop  # later keys are invisible to this block
        visible = visible_tokens(total - new + start, stop - start, seen, window, q.device)
        if sinks is not None:
            visible, seen = pad(visible, (1, 0), value=True), seen + 1
        block = queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen]
        blocks.append(scaled_dot_product_attention(*block, attn_mask=visible, scale=scale))
    return torch.cat(blocks, dim=2)[..., :value_size].transpose(1, 2)


def visible_tokens(first: int, queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys the queries at positions ``first``, ``first + 1``, … attend to, bool ``[queries, keys]``."""
    query = torch.arange(first, first + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def _with_sinks(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Put a key in front that every query meets with its head's logit and whose value is zero.

    Heads get further entries: the query's first is the logit, and only the new key has a 1 there. In half precision the
    logit is split in a rounded part and the rest, so that it hardly loses any digits.

    Args:
        queries: ``[N, H, L, d]``.
        keys: ``[N, H, S, d]``.
        values: ``[N, H, S, d]``.
        logits: before the scale, ``[H]``.
    """
    head_size, dtype = queries.shape[3], queries.dtype
    rounded = logits.to(dtype)
    queries, keys, values = (pad(tensor, (0, ALIGNMENT)) for tensor in (queries, keys, values))
    keys, values = pad(keys, (0, 0, 1, 0)), pad(values, (0, 0, 1, 0))
    queries[..., head_size] = rounded[:, None]
    queries[..., head_size + 1] = (logits.float() - rounded.float()).to(dtype)[:, None]
    keys[:, :, 0, head_size : head_size + 2] = 1
    return queries, keys, values
