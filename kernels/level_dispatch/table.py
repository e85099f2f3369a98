"""What the rule `level` must know of a layer's plan, laid out for the kernel once when a plan is loaded.

Shape legend: E logical experts, C most copies of any expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_GPUS = 8  # that the kernel serves
GROUP = 8  # experts that the kernel serves between two reads


@dataclass(frozen=True)
class DispatchTable:
    """One layer of a plan, as one rank sees it.

    Attributes:
        copies: GPUs that hold a copy of each expert, int64 ``[E, C]``, ascending, padded with -1.
        slot_of_expert: int32 ``[E]``, -1 where this rank has no slot for it.
        rank: of this rank; GPU g of the plan is rank g.
        num_gpus: of the plan.
        split_above_tokens: experts with more pairs and at least two copies are split; None never splits.
        holders: the GPUs of ``copies`` as bits, int32 ``[E]``.
        places: every expert's place in the order (number of copies, id), int32 ``[E]``.
        num_single: experts with one copy, which come first in that order.
        fields: the kernel's notes, sixteen bits per place, zeros at first, int64.
        choices: the kernel's notes, four bits per place, int32.
    """

    copies: torch.Tensor
    slot_of_expert: torch.Tensor
    rank: int
    num_gpus: int
    split_above_tokens: int | None
    holders: torch.Tensor
    places: torch.Tensor
    num_single: int
    fields: torch.Tensor
    choices: torch.Tensor

    @staticmethod
    def build(
        copies: torch.Tensor, slot_of_expert: torch.Tensor, rank: int, num_gpus: int, split_above_tokens: int | None
    ) -> DispatchTable:
        """From a plan's copies; tensors go to the device of ``slot_of_expert``."""
        host = copies.long().cpu()
        num_copies = (host >= 0).sum(dim=1)
        order = num_copies.sort(stable=True).indices  # ids ascend among equals
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        holders = torch.where(host >= 0, 1 << host.clamp(min=0), 0).sum(dim=1)
        device, groups = slot_of_expert.device, -(-len(host) // GROUP)
        return DispatchTable(
            copies=host.to(device),
            slot_of_expert=slot_of_expert.int(),
            rank=rank,
            num_gpus=num_gpus,
            split_above_tokens=split_above_tokens,
            holders=holders.int().to(device),
            places=places.int().to(device),
            num_single=int((num_copies == 1).sum()),
            fields=torch.zeros(2 * (groups + 1), dtype=torch.int64, device=device),  # one group is read ahead
            choices=torch.zeros(groups, dtype=torch.int32, device=device),
        )

    @property
    def has_copies(self) -> bool:
        """Whether any expert has a choice of GPUs."""
        return self.num_single < len(self.holders)
