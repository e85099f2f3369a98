"""The native path's exchange modes, and how the ranks of a run meet in one of them."""

from __future__ import annotations

import logging

import torch

from kernels.exchange import Mailbox
from runtime.distributed import RankGroup
from runtime.native.families import DecoderShape
from runtime.native.heads import HeadShare
from runtime.native.ranks import MOST_ROWS, Ranks, open_together
from runtime.native.ranks_allreduce import AllReduceRanks
from runtime.native.ranks_alltoall import AllToAllRanks

logger = logging.getLogger(__name__)

MODES: dict[str, type[Ranks]] = {mode.exchange: mode for mode in (AllReduceRanks, AllToAllRanks)}


def meet(exchange: str, shape: DecoderShape, group: RankGroup, dtype: torch.dtype, max_rows: int) -> Ranks:
    """Share the work of a decoder; rank 0 says in the log how.

    Args:
        exchange: mode, one of `MODES`.
        shape: of the whole decoder.
        group: all ranks.
        dtype: of the hidden states.
        max_rows: of a decode step.
    """
    mode = MODES[exchange]
    share = HeadShare.choose(shape, group.rank, group.world_size) if mode.splits_heads else HeadShare.whole(shape)
    mailboxes: list[Mailbox] = []
    way = f"{mode.moved} over {group.backend}"
    if group.backend == "nccl" and group.one_host:
        rows = min(max_rows, MOST_ROWS)
        row_bytes = max(shape.width * dtype.itemsize, 8 * shape.top_k)  # the second of routes
        mailboxes, problem = open_together(group, mode.num_mailboxes, rows, row_bytes)
        if mailboxes:
            way = f"up to {rows} rows: {mode.moved} through the GPUs' memory, more over {group.backend}"
        else:
            way += f": the GPUs cannot write to each other's memory ({problem})"
    if group.rank == 0:
        heads = "each rank has all heads" if share.ranks == 1 else "attention is split by heads"
        logger.info("exchange %s of %d ranks: %s; %s", exchange, group.world_size, heads, way)
    return mode(group, share, mailboxes)
