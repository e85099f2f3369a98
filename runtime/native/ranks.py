"""Several ranks behind one decoder: each computes its heads' and its slots' part, and the parts are summed.

The ranks' sums have the same bits, so that all of them route every token alike and sample the same tokens.

Shape legend: T tokens, K choices per token, D model width.
"""

from __future__ import annotations

import logging

import torch

from kernels.combine import combine
from kernels.exchange import Mailbox, open_mailbox, reduce_add_norm, reduce_combine
from kernels.exchange.reference import sum_parts
from kernels.level_dispatch import MOST_GPUS, DispatchTable
from kernels.rms_norm import add_rms_norm
from kernels.route import Routes
from placement.plan import PlacementPlan
from runtime.distributed import RankGroup
from runtime.errors import ModelError, one_line
from runtime.native.families import DecoderShape
from runtime.native.heads import HeadShare
from runtime.native.weights import DecoderWeights

logger = logging.getLogger(__name__)

MOST_ROWS = 512  # of a step whose rows go through mailboxes; longer prefills go over the process group


class Ranks:
    """This rank among the others.

    Args:
        group: all ranks, with the same decoder each.
        share: of the heads.
        mailbox: for steps of few rows; None sends all of them over the process group.
    """

    def __init__(self, group: RankGroup, share: HeadShare, mailbox: Mailbox | None = None) -> None:
        self.group, self.share, self.mailbox = group, share, mailbox

    @staticmethod
    def meet(shape: DecoderShape, group: RankGroup, dtype: torch.dtype, max_rows: int) -> Ranks:
        """Share the work of a decoder; rank 0 says in the log how.

        Args:
            shape: of the whole decoder.
            group: all ranks.
            dtype: of the hidden states.
            max_rows: of a decode step.
        """
        share = HeadShare.choose(shape, group.rank, group.world_size)
        mailbox, way = None, f"the ranks' parts are summed over {group.backend}"
        if group.backend == "nccl" and group.one_host:
            mailbox, problem = _open_together(group, min(max_rows, MOST_ROWS), shape.width * dtype.itemsize)
            if mailbox is None:
                way += f": the GPUs cannot write to each other's memory ({problem})"
            else:
                way = f"up to {mailbox.most_rows} rows are summed through the GPUs' memory, more over {group.backend}"
        if group.rank == 0:
            heads = "each rank has all heads" if share.ranks == 1 else "attention is split by heads"
            logger.info("%d ranks: %s; %s", group.world_size, heads, way)
        return Ranks(group, share, mailbox)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        return int(self.group.gather_tokens(torch.tensor([number])).min())

    def place(self, weights: DecoderWeights, plan: PlacementPlan) -> None:
        """Give loaded weights what depends on the other ranks: the choice among copies, and biases that count once.

        Raises:
            ModelError: the choice among copies on so many GPUs would wait for the host.
        """
        position = {layer: index for index, layer in enumerate(plan.layer_ids)}
        for number, layer in enumerate(weights.layers):
            if self.share.ranks > 1 and self.group.rank > 0:
                layer.output_bias = None  # rank 0's part has it
            if layer.experts is not None:
                copies = torch.as_tensor(plan.copies(position[number])).long()
                table = DispatchTable.build(
                    copies,
                    layer.experts.slot_of_expert,
                    self.group.rank,
                    self.group.world_size,
                    plan.dispatch.split_above_tokens,
                )
                if table.has_copies and table.num_gpus > MOST_GPUS and self.group.device.type == "cuda":
                    raise ModelError(
                        f"a plan with copies for {table.num_gpus} GPUs: the native path has at most {MOST_GPUS}; plan "
                        "without copies, or give path=universal"
                    )
                layer.experts.dispatch = table if table.has_copies else None

    def finish_attention(
        self, part: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `add_rms_norm` gives for the attention's output, of which a rank has its heads' part ``[T, D]``."""
        if self.share.ranks == 1:
            return add_rms_norm(part, residual, norm_weight, eps)
        if self.mailbox is not None and len(part) <= self.mailbox.most_rows:
            return reduce_add_norm(part, residual, norm_weight, eps, self.mailbox)
        return add_rms_norm(self._sum(part), residual, norm_weight, eps)

    def finish_experts(
        self,
        pairs: torch.Tensor,
        routes: Routes,
        shared: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `combine` gives, of whose pairs ``[T·K, D]`` a rank has those with a slot of its own."""
        if self.mailbox is not None and len(residual) <= self.mailbox.most_rows:
            return reduce_combine(pairs, routes, shared, residual, norm_weight, eps, self.mailbox)
        part, _ = combine(pairs, routes, None, torch.zeros_like(residual), norm_weight, eps)
        total = self._sum(part)
        return add_rms_norm(total if shared is None else total + shared, residual, norm_weight, eps)

    def _sum(self, part: torch.Tensor) -> torch.Tensor:
        """Of all ranks' parts, the same bits everywhere."""
        if self.group.backend == "nccl":
            return self.group.all_reduce(part)
        return sum_parts(self.group.all_gather(part)).to(part.dtype)


def _open_together(group: RankGroup, rows: int, row_bytes: int) -> tuple[Mailbox | None, str]:
    """This rank's mailbox where every rank has one, else what the first rank without one found."""
    mailbox, problem = None, ""
    try:
        mailbox = open_mailbox(group.process_group, rows, row_bytes, group.device)
    except RuntimeError as error:
        problem = one_line(error)
    problems = [text for text in group.gather_text(problem) if text]
    return (None, problems[0]) if problems else (mailbox, "")
