"""The paged key/value cache: fixed pages in one tensor per layer; `runtime.pages` says who holds which.

Shape legend: G kv heads, d head size.
"""

from __future__ import annotations

import torch

from runtime.native.families import DecoderShape

PAGE_SIZE = 64  # tokens


class PagedCache:
    """Keys and values of all layers.

    Args:
        shape: of the decoder.
        num_pages: pages per layer.
        page_size: tokens per page.
        dtype: of keys and values.
        device: of keys and values.

    Attributes:
        keys: per layer ``[pages, page size, G, d]``.
        values: the same.
    """

    def __init__(
        self, shape: DecoderShape, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.num_layers, num_pages, page_size, shape.num_kv_heads, shape.head_size)
        self.keys = list(torch.zeros(size, dtype=dtype, device=device))
        self.values = list(torch.zeros(size, dtype=dtype, device=device))
        self.page_size = page_size

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return int(self.keys[0].shape[0]) * self.page_size
