"""Attention of one new token per sequence over a paged key/value cache.

Shape legend: B sequences, H query heads, G key/value heads (H a multiple of G), d head size.
"""

from __future__ import annotations

import torch

from kernels.decode_attention.checks import check
from kernels.decode_attention.reference import decode_attention_reference

__all__ = ["decode_attention", "decode_attention_reference"]


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the last token of every sequence to all of its tokens, itself included.

    On a GPU the launch depends on shapes alone, so that a captured graph serves any lengths: give ``page_table`` as
    many columns as the longest context the graph is meant for needs, because the work is split by that width.

    Args:
        q: queries ``[B, H, d]``, bfloat16, float16 or float32.
        k_cache: paged keys ``[pages, page_size, G, d]``, of the dtype of ``q``.
        v_cache: paged values, like ``k_cache``.
        page_table: the page of every ``page_size`` tokens of a sequence, int32 ``[B, max_pages]``; entries beyond a
            sequence's length are not read.
        lengths: tokens of each sequence in the cache, the query's own included, int32 ``[B]``; 0 for a row that is only
            padding.
        scale: factor of the scores.
        window: attend to the last ``window`` tokens alone (sliding window, the query's own included); None to all.
        sinks: a score per head that takes part in the softmax without a value (gpt-oss), ``[H]``; None for none.

    Returns:
        ``[B, H, d]``, of the dtype of ``q``; zeros where the length is 0.

    Raises:
        OperatorError: the shapes or dtypes of queries and caches don't fit, or the window is below 1.
    """
    check(q, k_cache, v_cache, window)
    if q.is_cuda:
        from kernels.decode_attention.kernel import decode_attention_triton

        return decode_attention_triton(q, k_cache, v_cache, page_table, lengths, scale, window, sinks)
    return decode_attention_reference(q, k_cache, v_cache, page_table, lengths, scale, window, sinks)
