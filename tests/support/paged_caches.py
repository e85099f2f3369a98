"""Paged caches for tests: pages in a random order, and NaN wherever a kernel has no business to read."""

from __future__ import annotations

import torch


def paged_cache(
    dense: tuple[torch.Tensor, torch.Tensor], lengths: list[int], page_size: int, extra_pages: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lay sequences out in pages.

    Args:
        dense: keys and values ``[B, N, G, d]``, of which row b's first ``lengths[b]`` tokens count.
        lengths: tokens of each sequence, at most N.
        page_size: tokens per page.
        extra_pages: columns of the page table beyond what N needs.

    Returns:
        Key and value caches ``[pages, page_size, G, d]`` and the page table int32 ``[B, max_pages]``, whose entries
        beyond a sequence's length are out of range.
    """
    batch, longest = dense[0].shape[:2]
    columns = -(-longest // page_size) + extra_pages
    num_pages = batch * columns + 1
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    shape = (num_pages, page_size, *dense[0].shape[2:])
    caches = [torch.full(shape, torch.nan, dtype=dense[0].dtype) for _ in dense]
    page_table = torch.full((batch, columns), num_pages + 1_000_000, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column, start in enumerate(range(0, length, page_size)):
            page_table[row, column] = page = order.pop()
            end = min(length, start + page_size)
            for cache, tokens in zip(caches, dense, strict=True):
                cache[page, : end - start] = tokens[row, start:end]
    return caches[0], caches[1], page_table
