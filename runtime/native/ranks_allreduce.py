"""Exchange mode `allreduce`: all ranks hold every token, compute their heads' and slots' parts, and sum them.

The ranks' sums have the same bits, so that all of them route every token alike and sample the same tokens.

Shape legend: T tokens, K choices per token, D model width.
"""

from __future__ import annotations

import torch

from kernels.combine import combine
from kernels.exchange import reduce_add_norm, reduce_combine
from kernels.exchange.reference import sum_parts
from kernels.rms_norm import add_rms_norm
from runtime.load import ring_bytes
from runtime.native.experts import Choice
from runtime.native.ranks import Ranks


class AllReduceRanks(Ranks):
    """Sums parts of the same rows; see `Ranks`."""

    exchange = "allreduce"
    everyone_holds_all = splits_heads = True
    splits_rows = False
    num_mailboxes = 1
    moved = "the ranks' parts are summed"

    def finish_attention(
        self, part: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ranks.finish_attention`."""
        if self.share.ranks == 1:
            return add_rms_norm(part, residual, norm_weight, eps)
        if self.fits(len(part)):
            return reduce_add_norm(part, residual, norm_weight, eps, self.mailboxes[0])
        return add_rms_norm(self._sum(part), residual, norm_weight, eps)

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
        if self.fits(len(residual)):
            return reduce_combine(pairs, choice.routes, shared, residual, norm_weight, eps, self.mailboxes[0])
        part, _ = combine(pairs, choice.routes, None, torch.zeros_like(residual), norm_weight, eps)
        total = self._sum(part)
        return add_rms_norm(total if shared is None else total + shared, residual, norm_weight, eps)

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        """Of all ranks' parts, the same bits everywhere."""
        if self.group.backend == "nccl":
            return self.group.all_reduce(part)
        return sum_parts(self.group.all_gather(part)).to(part.dtype)

    def sent_bytes(self, rows: int, row_bytes: int, top_k: int) -> int:
        """As a ring sends them; see `Ranks.sent_bytes`."""
        return ring_bytes(self.group.world_size, rows, row_bytes)
