"""Plain-torch reference of decode attention over a paged cache.

Shape legend: B sequences, H query heads, G key/value heads, d head size, N longest context of the batch.
"""

from __future__ import annotations

import torch


def gather_pages(cache: torch.Tensor, page_table: torch.Tensor, length: int) -> torch.Tensor:
    """The first ``length`` tokens of every sequence, ``[B, length, …]``, from a cache ``[pages, page_size, …]``.

    Table entries that a sequence does not reach may hold anything: they are taken as page 0.
    """
    page_size = cache.shape[1]
    token = torch.arange(length, device=cache.device)
    pages = page_table[:, token // page_size].long()
    pages = pages.where((pages >= 0) & (pages < cache.shape[0]), 0)
    return cache[pages, token % page_size]


def visible_tokens(lengths: torch.Tensor, longest: int, window: int | None) -> torch.Tensor:
    """Which tokens the last one of each sequence attends to, bool ``[B, longest]``."""
    token = torch.arange(longest, device=lengths.device)
    visible = token < lengths[:, None]
    return visible if window is None else visible & (token >= lengths[:, None] - window)


def decode_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `decode_attention` computes, on any device; the same arguments and results. Synchronises."""
    batch, num_heads, head_size = q.shape
    num_kv_heads = k_cache.shape[2]
    longest = int(lengths.max()) if batch else 0
    if longest == 0:
        return torch.zeros_like(q)
    visible = visible_tokens(lengths, longest, window)
    keys = gather_pages(k_cache, page_table, longest).float().masked_fill(~visible[..., None, None], 0)
    values = gather_pages(v_cache, page_table, longest).float().masked_fill(~visible[..., None, None], 0)
    grouped = q.float().view(batch, num_kv_heads, num_heads // num_kv_heads, head_size)
    scores = torch.einsum("bghd,bngd->bghn", grouped, keys).flatten(1, 2) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[None, :, None].expand(batch, -1, 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :longest].nan_to_num()  # a row without tokens: zeros
    grouped_weights = weights.view(batch, num_kv_heads, -1, longest)
    return torch.einsum("bghn,bngd->bghd", grouped_weights, values).reshape(q.shape).to(q.dtype)
