"""The paged key/value cache: fixed pages in one tensor per layer, handed out to sequences whole.

A sequence gets the pages of everything it may ever hold when it is admitted. So no step can run out of pages, and the
page table changes only when sequences come or go.

Shape legend: G kv heads, d head size.
"""

from __future__ import annotations

import torch

from runtime.errors import ModelError
from runtime.native.families import DecoderShape

PAGE_SIZE = 64  # tokens


class PageAllocator:
    """Which pages are free.

    Args:
        num_pages: of the cache.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(reversed(range(num_pages)))
        self._held: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def pages_held(self, sequence: int) -> int:
        """Pages of one sequence; 0 where it has none."""
        return len(self._held.get(sequence, ()))

    def allocate(self, sequence: int, num_tokens: int) -> list[int]:
        """Give a sequence the pages of all tokens it may ever have.

        Raises:
            ModelError: there are not so many free pages; none is given then.
        """
        assert sequence not in self._held, f"sequence {sequence} has pages already"
        needed = self.pages_for(num_tokens)
        if needed > len(self._free):
            raise ModelError(
                f"{num_tokens} tokens: expected at most {len(self._free) * self.page_size}, for which there are pages; "
                "ask for fewer, or serve with a larger cache_tokens"
            )
        self._held[sequence] = [self._free.pop() for _ in range(needed)]
        return self._held[sequence]

    def release(self, sequence: int) -> None:
        """Take a sequence's pages back."""
        self._free += reversed(self._held.pop(sequence))


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
