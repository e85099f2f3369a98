"""Several ranks behind one decoder: what the exchange modes share, and where they differ.

Shape legend: T rows of this rank, E logical experts, K choices per row, D model width, G ranks, N rows to serve from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from kernels.exchange import Mailbox, gather, open_mailbox
from kernels.level_dispatch import MOST_GPUS, DispatchTable
from kernels.rms_norm import add_rms_norm
from placement.plan import PlacementPlan
from runtime.distributed import RankGroup
from runtime.errors import ModelError, one_line
from runtime.native.experts import Choice, choose_among_all
from runtime.native.heads import HeadShare
from runtime.native.weights import DecoderWeights

if TYPE_CHECKING:
    from runtime.native.forward import Decoder

MOST_ROWS = 512  # of a step whose rows go through mailboxes; longer prefills go over the process group


class Ranks(ABC):
    """This rank among the others, in one exchange mode.

    Args:
        group: all ranks, with the same decoder each.
        share: of the heads.
        mailboxes: for steps of few rows; none send all of them over the process group.

    Attributes:
        exchange: the mode.
        everyone_holds_all: whether every rank caches every sequence.
        splits_rows: whether each rank has rows of its own; padding then has routes of -1.
        splits_heads: whether the ranks may share the heads of the attention.
        num_mailboxes: that the mode needs.
        moved: what travels between the ranks, in a word for the log.
    """

    exchange: ClassVar[str]
    everyone_holds_all: ClassVar[bool]
    splits_rows: ClassVar[bool]
    splits_heads: ClassVar[bool]
    num_mailboxes: ClassVar[int]
    moved: ClassVar[str]

    def __init__(self, group: RankGroup, share: HeadShare, mailboxes: Sequence[Mailbox] = ()) -> None:
        self.group, self.share, self.mailboxes = group, share, list(mailboxes)

    def holds(self, home: int) -> bool:
        """Whether this rank caches sequences with that home."""
        return self.everyone_holds_all or home == self.group.rank

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        return int(self.group.gather_tokens(torch.tensor([number])).min())

    def fits(self, num_rows: int) -> bool:
        """Whether a pass of so many rows goes through mailboxes; the same on every rank."""
        return bool(self.mailboxes) and num_rows <= self.mailboxes[0].most_rows

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
                table = DispatchTable.build(
                    torch.as_tensor(plan.copies(position[number])).long(),
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
                layer.experts.dispatch = table if self.needs_table(table) else None

    def needs_table(self, table: DispatchTable) -> bool:
        """Whether a layer's experts are chosen with the help of this table."""
        return table.has_copies

    def finish_attention(
        self, part: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `add_rms_norm` gives for the attention's output, of which a rank has its heads' part ``[T, D]``."""
        assert self.share.ranks == 1
        return add_rms_norm(part, residual, norm_weight, eps)

    def choose(self, decoder: Decoder, number: int, logits: torch.Tensor, places: torch.Tensor) -> Choice:
        """Which experts serve the rows of a layer; the same choice on every rank.

        Args:
            decoder: the model.
            number: of the layer.
            logits: of the router for this rank's rows ``[T, E]``.
            places: integer ``[T]``, negative for padding.
        """
        return choose_among_all(decoder, number, logits)

    def send(self, normed: torch.Tensor, choice: Choice) -> torch.Tensor:
        """The rows that this rank's experts serve ``[N, D]``, from every rank's own ``[T, D]``."""
        return normed

    @abstractmethod
    def finish_experts(
        self,
        pairs: torch.Tensor,
        choice: Choice,
        shared: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `combine` gives for this rank's rows, of whose pairs each rank has those with a slot of its own.

        Args:
            pairs: outputs of this rank's slots ``[N·K, D]``.
            choice: of this layer.
            shared: output of the shared experts ``[T, D]``, or None.
            residual: ``[T, D]``.
            norm_weight: ``[D]``.
            eps: added to the mean square.
        """

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Every rank's rows of whole 32-bit words ``[T, N]``, as many on each, on every rank ``[G, T, N]``."""
        if self.fits(len(rows)) and rows[0].nbytes <= self.mailboxes[0].row_bytes:
            return gather(rows.contiguous(), self.mailboxes[0])
        return self.group.all_gather(rows)

    @abstractmethod
    def sent_bytes(self, rows: int, row_bytes: int, top_k: int) -> int:
        """Bytes that all ranks have sent in MoE layers; every rank calls this, and what was counted starts anew.

        Args:
            rows: tokens of all sequences that were fed since the last call, added up over MoE layers.
            row_bytes: of a hidden state.
            top_k: choices per token.
        """


def open_together(group: RankGroup, count: int, rows: int, row_bytes: int) -> tuple[list[Mailbox], str]:
    """So many mailboxes of this rank where every rank has them, else what the first rank without one found."""
    mailboxes, problem = [], ""
    try:
        for _ in range(count):
            mailboxes.append(open_mailbox(group.process_group, rows, row_bytes, group.device))
    except RuntimeError as error:
        problem = one_line(error)
    problems = [text for text in group.gather_text(problem) if text]
    return ([], problems[0]) if problems else (mailboxes, "")
