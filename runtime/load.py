"""What the experts' slots had to do: token–expert pairs and activity, counted where the model runs.

Shape legend: L MoE layers, G GPUs, P slots (of the GPU that has most), T tokens, K choices, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.slot_counts import add_slot_counts
from placement.plan import PlacementPlan
from runtime.context import StepContext
from runtime.exchange import DispatchRule


@dataclass(frozen=True)
class Load:
    """Work of all slots over some steps; GPUs with fewer slots than P are padded with zeros.

    Attributes:
        pairs: token–expert pairs computed, prefill included, int64 ``[L, G, P]``.
        active: decode steps in which a slot had any pair, int64 ``[L, G, P]``.
        steps: decode steps.
        exchanged_bytes: sent between ranks for the experts, over all ranks.
    """

    pairs: torch.Tensor
    active: torch.Tensor
    steps: int
    exchanged_bytes: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.pairs + other.pairs,
            self.active + other.active,
            self.steps + other.steps,
            self.exchanged_bytes + other.exchanged_bytes,
        )


class SlotCounter:
    """Adds up the slots of every pass on the device; reading them is the only round trip to the host.

    Args:
        num_layers: L.
        num_slots: all slots that are counted, P.
        device: of the routes.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        # Allocated before any CUDA graph is captured, which then adds to it at every replay.
        self._totals = torch.zeros((2, num_layers, num_slots), dtype=torch.int64, device=device)
        self._noted: list[torch.Tensor] = []

    def note(self, slots: torch.Tensor) -> None:
        """Take the slots of the next layer of the pass under way, int32 ``[T, K]``; -1 is not counted."""
        self._noted.append(slots)

    def end_pass(self, decoding: bool, places: torch.Tensor | None = None) -> torch.Tensor:
        """Add the layers that were noted.

        Args:
            decoding: whether this was a decode step, whose active slots are counted, too.
            places: integer ``[T]``, negative for padding, which is not counted; None counts all tokens.

        Returns:
            The noted slots, int32 ``[L, T, K]``.
        """
        slots = torch.stack(self._noted)
        self._noted = []
        pairs, active = self._totals
        add_slot_counts(slots, places, pairs, active if decoding else None)
        return slots

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs and decode steps with any pair since the last call, int64 ``[L, P]``, on the host."""
        pairs, active = self._totals.cpu().clone()
        self._totals.zero_()
        return pairs, active


class DispatchLoad:
    """Rank 0's view on the universal path: there the dispatch of every rank's tokens is known.

    Args:
        plan: says where the slots are.
        exchange: ``allreduce`` or ``alltoall``.
        context: of the running forward pass.
        device: of the routes.
    """

    def __init__(self, plan: PlacementPlan, exchange: str, context: StepContext, device: torch.device) -> None:
        self._context, self._exchange = context, exchange
        self._num_gpus = plan.num_gpus
        self._widest = max(len(gpu) for layer in plan.slots for gpu in layer)
        self._slot_of = torch.full((plan.num_layers, plan.num_gpus, plan.num_experts), -1, dtype=torch.int32)
        for layer, gpus in enumerate(plan.slots):
            for gpu, experts in enumerate(gpus):
                first = gpu * self._widest
                self._slot_of[layer, gpu, list(experts)] = torch.arange(first, first + len(experts), dtype=torch.int32)
        self._slot_of = self._slot_of.to(device)
        self._counter = SlotCounter(plan.num_layers, plan.num_gpus * self._widest, device)
        self._steps = 0
        self._exchanged_bytes = torch.zeros((), dtype=torch.int64, device=device)

    def watch(self, layer_index: int, rule: DispatchRule) -> DispatchRule:
        """The same rule, whose decisions are counted."""
        return _WatchedRule(rule, self._slot_of[layer_index], self._counter)

    def end_pass(self, decoding: bool) -> None:
        """Add the layers of a forward pass."""
        slots = self._counter.end_pass(decoding)
        self._steps += decoding
        if self._num_gpus > 1:
            self._exchanged_bytes += self._sent_bytes(slots)

    def take(self) -> Load:
        """What was added since the last call."""
        pairs, active = (totals.unflatten(1, (self._num_gpus, self._widest)) for totals in self._counter.take())
        load = Load(pairs, active, self._steps, int(self._exchanged_bytes))
        self._steps = 0
        self._exchanged_bytes.zero_()
        return load

    def _sent_bytes(self, slots: torch.Tensor) -> torch.Tensor | int:
        """Bytes that a pass with slots ``[L, T, K]`` sent: float32 sums round a ring, or rows to GPUs and back."""
        layers, tokens, _ = slots.shape
        row_bytes, sum_bytes = self._context.row_bytes, 4 * self._context.row_values
        if self._exchange == "allreduce":
            return ring_bytes(self._num_gpus, layers * tokens, sum_bytes)
        counts = torch.tensor(self._context.tokens_per_rank, device=slots.device)
        home = torch.repeat_interleave(torch.arange(self._num_gpus, device=slots.device), counts)  # [T]
        served = slots // self._widest
        visited = torch.stack([(served == gpu).any(dim=2) & (home != gpu) for gpu in range(self._num_gpus)])
        return visited.sum() * (row_bytes + sum_bytes)


def ring_bytes(num_gpus: int, rows: int, row_bytes: int) -> int:
    """Bytes that all GPUs together send to sum their parts of so many rows round a ring."""
    return 2 * (num_gpus - 1) * rows * row_bytes


class _WatchedRule(DispatchRule):
    """A dispatch rule whose decisions are noted.

    Args:
        rule: decides.
        slot_of: number of every GPU's slot of every expert, int32 ``[G, E]``, -1 where it has none.
        counter: notes them.
    """

    def __init__(self, rule: DispatchRule, slot_of: torch.Tensor, counter: SlotCounter) -> None:
        super().__init__(rule.copies, rule.num_gpus, rule.split_above_tokens)
        self._rule, self._slot_of, self._counter = rule, slot_of, counter

    def __call__(self, experts: torch.Tensor) -> torch.Tensor:
        """See `DispatchRule`."""
        gpus = self._rule(experts)
        self._counter.note(self._slot_of[gpus, experts.long()])
        return gpus


def active_experts(load: Load) -> torch.Tensor:
    """Mean active experts per decode step, float64 ``[L, G]``; 0 where there was no step."""
    return load.active.sum(dim=2).double() / max(load.steps, 1)


def balancedness(load: Load) -> torch.Tensor:
    """Mean over busiest GPU's pairs, float64 ``[L]``: 1 where all have the same, also where they have none."""
    by_gpu = load.pairs.sum(dim=2).double()
    busiest = by_gpu.amax(dim=1)
    return torch.where(busiest > 0, by_gpu.mean(dim=1) / busiest.clamp(min=1), 1.0)


def slots_as_lists(counts: torch.Tensor, slots: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Counts ``[L, G, P]`` without the padding, as the plan lists its slots."""
    return [
        [row[: len(held)] for row, held in zip(rows, gpus, strict=True)]
        for rows, gpus in zip(counts.tolist(), slots, strict=True)
    ]
