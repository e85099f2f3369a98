"""Memory of this GPU that the other GPUs of the host write rows into.

Shape legend: G GPUs, R most rows, W 32-bit words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Mailbox:
    """One end of the exchange; every rank makes its own with the same sizes and uses it in the same order.

    Attributes:
        rank: of this GPU.
        boxes: messages by parity of the epoch, sender and row, int64 ``[2, G, R, W]``.
        peers: address of every GPU's ``boxes``, int64 ``[G]``.
        counters: exchanges that each row took part in, int32 ``[R]``.
        received: how often each row came by `dispatch` from another GPU, int64 ``[R]``.
        sums: messages of summed rows by parity and row, int64 ``[2, R, W]``.
        sum_peers: address of every GPU's ``sums``, int64 ``[G]``.
    """

    rank: int
    boxes: torch.Tensor
    peers: torch.Tensor
    counters: torch.Tensor
    received: torch.Tensor
    sums: torch.Tensor
    sum_peers: torch.Tensor

    @property
    def num_gpus(self) -> int:
        """G."""
        return self.boxes.shape[1]

    @property
    def most_rows(self) -> int:
        """R."""
        return self.boxes.shape[2]

    @property
    def row_bytes(self) -> int:
        """Of the longest row that fits."""
        return self.boxes.shape[3] * 4

    @staticmethod
    def in_memory(memory: torch.Tensor, addresses: list[int], rank: int, most_rows: int, words: int) -> Mailbox:
        """Lay a mailbox out.

        Args:
            memory: zeros, int64, as many as `messages` says; on every GPU laid out alike.
            addresses: of every GPU's memory, as this GPU sees them.
            rank: of this GPU.
            most_rows: R.
            words: W.
        """
        gpus, held = len(addresses), 2 * len(addresses) * most_rows * words
        peers = torch.tensor(addresses, dtype=torch.int64)
        return Mailbox(
            rank=rank,
            boxes=memory[:held].view(2, gpus, most_rows, words),
            peers=peers.to(memory.device),
            counters=torch.zeros(most_rows, dtype=torch.int32, device=memory.device),
            received=torch.zeros(most_rows, dtype=torch.int64, device=memory.device),
            sums=memory[held:].view(2, most_rows, words),
            sum_peers=(peers + held * memory.itemsize).to(memory.device),
        )


def messages(num_gpus: int, most_rows: int, words: int) -> int:
    """Of a mailbox, 8 bytes each."""
    return 2 * (num_gpus + 1) * most_rows * words


def open_mailbox(group: Any, most_rows: int, row_bytes: int, device: torch.device) -> Mailbox:
    """Make this rank's mailbox and meet the others; every rank of the group calls this.

    Args:
        group: process group of one host's ranks, each with a GPU that can reach the others' memory.
        most_rows: R.
        row_bytes: of the longest row, a multiple of 4.
        device: of this rank.

    Raises:
        RuntimeError: the GPUs cannot reach each other's memory.
    """
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric_memory

    rank, words = dist.get_rank(group), row_bytes // 4
    size = messages(dist.get_world_size(group), most_rows, words)
    memory = symmetric_memory.empty(size, dtype=torch.int64, device=device)
    handle = symmetric_memory.rendezvous(memory, group)
    inside = memory.data_ptr() - handle.buffer_ptrs[rank]  # where the tensor begins in what was shared
    memory.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group, device_ids=[device.index])  # nobody writes before everybody has zeros
    torch.cuda.synchronize(device)
    return Mailbox.in_memory(memory, [address + inside for address in handle.buffer_ptrs], rank, most_rows, words)
