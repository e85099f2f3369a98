"""The running sequences as a decode step reads them: one row each in fixed buffers on the device.

A step leaves the buffers ready for the next one, so that nothing is uploaded while the same sequences run.

Shape legend: B rows, C pages of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from runtime.requests import SamplingParameters


@dataclass
class RunningSequence:
    """A sequence between two steps.

    Attributes:
        pages: that it holds, in order.
        position: of ``token``, which is fed next.
        token: its newest.
        sampling: of its tokens, resolved.
        home: the rank that has its row, where not all have.
    """

    pages: list[int]
    position: int
    token: int
    sampling: SamplingParameters
    home: int = 0


@dataclass
class Rows:
    """What a step reads and leaves, all on the device.

    Attributes:
        tokens: to be fed, int64 ``[B]``.
        positions: of these tokens, int32 ``[B]``.
        stored: 1 where the row is a sequence's own; padding repeats row 0 and caches nothing; int64 ``[B]``.
        page_table: int32 ``[B, C]``.
        temperature: float32 ``[B]``.
        top_p: float32 ``[B]``.
        seeds: int64 ``[B]``.
        sampled: the step's new tokens, -1 where the logits are not finite, int64 ``[B]``.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    stored: torch.Tensor
    page_table: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    sampled: torch.Tensor

    @staticmethod
    def empty(num_rows: int, num_pages: int, device: torch.device) -> Rows:
        """Rows that feed token 0 at position 0 of page 0 and cache nothing."""
        integers = torch.zeros((4, num_rows), dtype=torch.int64, device=device)
        numbers = torch.zeros((2, num_rows), dtype=torch.float32, device=device)
        return Rows(
            tokens=integers[0],
            positions=torch.zeros(num_rows, dtype=torch.int32, device=device),
            stored=integers[1],
            page_table=torch.zeros((num_rows, num_pages), dtype=torch.int32, device=device),
            temperature=numbers[0],
            top_p=numbers[1] + 1,
            seeds=integers[2],
            sampled=integers[3],
        )

    def clear(self) -> None:
        """Back to what `empty` makes: what is left of ended sequences would write into pages that others have now."""
        for tensor in (self.tokens, self.positions, self.stored, self.page_table):
            tensor.zero_()

    def fill(self, sequences: Sequence[RunningSequence]) -> None:
        """Lay sequences out, one per row; further rows repeat the first one without caching.

        Repeated rows choose the same experts as the row that they repeat, so that padding reads no further weights.
        Without sequences all rows are padding; as these advance with every step, they must be laid out for each.
        """
        if not sequences:
            self.clear()
            return
        padding = len(self.tokens) - len(sequences)
        rows = [*sequences, *[sequences[0]] * padding]
        pages = np.zeros(self.page_table.shape, dtype=np.int32)
        for row, sequence in enumerate(rows):
            held = sequence.pages[: pages.shape[1]]
            pages[row, : len(held)] = held
        _upload(self.page_table, pages)
        _upload(self.tokens, [sequence.token for sequence in rows])
        _upload(self.positions, [sequence.position for sequence in rows])
        _upload(self.stored, [1] * len(sequences) + [0] * padding)
        sampling = [sequence.sampling for sequence in rows]
        _upload(self.temperature, [each.temperature for each in sampling])
        _upload(self.top_p, [each.top_p for each in sampling])
        _upload(self.seeds, [each.seed for each in sampling])

    def set_pages(self, rows: Sequence[int], columns: Sequence[int], pages: Sequence[int]) -> None:
        """Add pages that sequences have got since they were laid out."""
        where = torch.empty((3, len(rows)), dtype=torch.int64, device=self.page_table.device)
        _upload(where, [rows, columns, pages])
        self.page_table[where[0], where[1]] = where[2].int()

    def feed_sampled(self, num_sequences: int) -> None:
        """Feed what ``sampled`` has now to the first rows; further ones go on repeating the first."""
        tokens = self.sampled.clamp(min=0)
        self.tokens[:num_sequences] = tokens[:num_sequences]
        self.tokens[num_sequences:] = tokens[0]

    def slot_index(self, page_size: int) -> torch.Tensor:
        """Where this step's keys and values are cached, int64 ``[B]``; -1 for padding."""
        page = self.page_table.gather(1, (self.positions // page_size).long()[:, None])[:, 0].long()
        return (page * page_size + self.positions % page_size + 1) * self.stored - 1


def _upload(target: torch.Tensor, values: Any) -> None:
    """Numbers from the host, without waiting for what the device is doing."""
    source = torch.as_tensor(values, dtype=target.dtype)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
