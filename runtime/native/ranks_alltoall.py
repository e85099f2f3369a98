"""Exchange mode `alltoall`: each rank has its own sequences' rows, which travel to their experts and back.

Every rank hears of all routes first, so that all choose alike among the copies. A row goes once to each rank that
serves one of its pairs, and each such rank sends one weighted sum back.

Where rows do not fit into mailboxes, or there are none, all ranks get all rows: with several experts per row nearly
every rank needs nearly every one, and collectives of fixed sizes ask no host.

Shape legend: T rows of a rank, the same number on each, E logical experts, K choices per row, G ranks, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kernels.combine import combine
from kernels.exchange import Mailbox, collect, dispatch, gather_routes
from kernels.exchange.reference import rows_served, sum_parts
from kernels.level_dispatch import DispatchTable, level_pairs
from kernels.permute import permute
from kernels.rms_norm import add_rms_norm
from kernels.route import Routes, route
from runtime.distributed import RankGroup
from runtime.native.experts import Choice, scoring_of
from runtime.native.heads import HeadShare
from runtime.native.ranks import Ranks

if TYPE_CHECKING:
    from runtime.native.forward import Decoder

OF_ROUTES, OF_ROWS, OF_RESULTS = 0, 1, 2  # the mailboxes; a gather of routes comes between two uses of the others


class AllToAllRanks(Ranks):
    """Sends rows to their experts; see `Ranks`."""

    exchange = "alltoall"
    everyone_holds_all = splits_heads = False
    splits_rows = True
    num_mailboxes = 3
    moved = "rows travel to their experts and back"

    def __init__(self, group: RankGroup, share: HeadShare, mailboxes: Sequence[Mailbox] = ()) -> None:
        super().__init__(group, share, mailboxes)
        # Rows of other ranks that this one served, less those that came by mailbox; allocated before graphs, which add.
        self._received = torch.zeros((), dtype=torch.int64, device=group.device)

    def needs_table(self, table: DispatchTable) -> bool:
        """See `Ranks.needs_table`: also says which rank has the only copy."""
        return True

    def choose(self, decoder: Decoder, number: int, logits: torch.Tensor, places: torch.Tensor) -> Choice:
        """See `Ranks.choose`."""
        experts = decoder.weights.layers[number].experts
        assert experts is not None
        assert experts.dispatch is not None
        table = experts.dispatch
        ids, _, weights = route(logits, **scoring_of(decoder.shape, experts))
        if decoder.replace_ids is not None:
            ids = decoder.replace_ids(number, ids)
        slots = gpus = None
        if self.fits(len(ids)):
            only_gpu = None if table.has_copies else table.copies[:, 0].contiguous()
            gathered = gather_routes(ids, weights, places, self.mailboxes[OF_ROUTES], table.slot_of_expert, only_gpu)
            ids, weights, slots, gpus = gathered
        else:
            ids, weights = self._gather_routes(ids, weights, places)
        if slots is None or gpus is None:
            slots, gpus = level_pairs(ids.flatten(0, 1), table)
        slots = slots.view(-1, ids.shape[2])
        routes = Routes(ids.flatten(0, 1), slots, weights.flatten(0, 1))
        return Choice(routes, permute(slots, len(experts.gate_up)), gpus.view_as(ids))

    def _gather_routes(
        self, ids: torch.Tensor, weights: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `gather_routes` gives, over the process group; both in one collective."""
        ids = torch.where(places[:, None] < 0, -1, ids)
        packed = self.group.all_gather(torch.cat([ids, weights.view(torch.int32)], dim=1))
        top_k = ids.shape[1]
        return packed[..., :top_k].contiguous(), packed[..., top_k:].contiguous().view(torch.float32)

    def send(self, normed: torch.Tensor, choice: Choice) -> torch.Tensor:
        """See `Ranks.send`; rows ``[G·T, D]``, undefined where this rank serves none of their pairs."""
        assert choice.gpus is not None
        if self.fits(len(normed)):
            return dispatch(normed, choice.gpus, self.mailboxes[OF_ROWS]).flatten(0, 1)
        served = rows_served(choice.gpus, self.group.rank)
        self._received += served.sum() - served[self.group.rank].sum()
        return self.group.all_gather(normed).flatten(0, 1)

    def finish_experts(
        self,
        pairs: torch.Tensor,
        choice: Choice,
        shared: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ranks.finish_experts`."""
        routes, gpus, rows = choice.routes, choice.gpus, len(residual)
        assert gpus is not None
        if self.fits(rows):
            return collect(pairs, routes, gpus, shared, residual, norm_weight, eps, self.mailboxes[OF_RESULTS])
        world = self.group.world_size
        nothing = residual.new_zeros((world * rows, residual.shape[1]))
        part, _ = combine(pairs, routes, None, nothing, norm_weight, eps)
        parts = self.group.all_to_all(part, [rows] * world, [rows] * world)
        total = sum_parts(parts.view(world, *residual.shape)).to(residual.dtype)
        return add_rms_norm(total if shared is None else total + shared, residual, norm_weight, eps)

    def sent_bytes(self, rows: int, row_bytes: int, top_k: int) -> int:
        """Every row once to each other rank that serves it and once back, and its routes to all; see `Ranks`."""
        received = self._received + sum(mailbox.received.sum() for mailbox in self.mailboxes)
        self._received.zero_()
        for mailbox in self.mailboxes:
            mailbox.received.zero_()
        visits = int(self.group.gather_tokens(received.cpu()[None]).sum())
        return 2 * visits * row_bytes + (self.group.world_size - 1) * rows * 8 * top_k
