"""Copies from mapped files to a GPU through pinned memory.

The driver copies pageable memory through one buffer of its own, at a fraction of the link's rate, and one copy at a
time. Here every thread has two pinned buffers: while one travels, the next is filled from the page cache.
"""

from __future__ import annotations

import torch

BUFFER_BYTES = 32 << 20


class Staging:
    """One thread's way to a GPU.

    Args:
        device: the GPU.

    Attributes:
        stream: on which the copies run, in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._free = [torch.cuda.Event() for _ in range(2)]
        self._next = 0

    def copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy a contiguous host tensor into a contiguous tensor of its dtype on the GPU, of as many numbers."""
        numbers, target = source.reshape(-1), destination.view(-1)
        size = BUFFER_BYTES // source.element_size()
        for start in range(0, len(numbers), size):
            piece = numbers[start : start + size]
            buffer, free = self._buffers[self._next], self._free[self._next]
            free.synchronize()  # returns at once where the buffer was never used
            staged = buffer[: piece.nbytes].view(piece.dtype)
            staged.copy_(piece)
            with torch.cuda.stream(self.stream):
                target[start : start + size].copy_(staged, non_blocking=True)
                free.record(self.stream)
            self._next ^= 1
