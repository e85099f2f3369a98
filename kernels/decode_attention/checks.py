"""Which queries and caches decode attention can work on."""

from __future__ import annotations

import torch

from kernels.errors import OperatorError


def check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, window: int | None) -> None:
    """Refuse what would be read wrongly.

    Raises:
        OperatorError: the shapes or dtypes of queries and caches don't fit, or the window is below 1.
    """
    num_heads, head_size = q.shape[1:]
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_size or num_heads % k_cache.shape[2]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (q, k_cache, v_cache))
        raise OperatorError(
            f"shapes {shapes}: expected queries [B, H, d] and two caches [pages, page_size, G, d], H a multiple of G"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise OperatorError(f"dtypes {q.dtype}, {k_cache.dtype}, {v_cache.dtype}: convert the queries to the caches'")
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise OperatorError("the numbers of a head do not lie side by side in the caches: lay them out so")
    if window is not None and window < 1:
        raise OperatorError(f"window {window}: expected at least 1, or None for none")
