"""Sharded experts: each rank keeps only the experts of its slots and computes only their share.

One function replaces the forward of every experts module that Transformers' families share (hidden states, chosen
ids, weights in; weighted sum out). The family's own mathematics stays: it is called on this rank's slots.

Shape legend: T tokens, K choices per token, E logical experts, P local slots, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from profiler.seam import MoELayer
from runtime.context import StepContext
from runtime.errors import ModelError
from runtime.exchange import DispatchRule, Exchange

ExpertsForward = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expert_parameter_names(layer: MoELayer) -> list[str]:
    """Names of the module's parameters, all of them stacked over experts ``[E, …]``.

    Raises:
        ModelError: the experts are kept in another way.
    """
    parameters = dict(layer.experts.named_parameters(recurse=False))
    # One that is not stacked would keep its rows while the slots are renumbered: every expert would use another's.
    odd = [
        name for name, parameter in parameters.items() if parameter.ndim < 2 or parameter.shape[0] != layer.num_experts
    ]
    if odd or not parameters:
        found = f"{odd[0]} has shape {list(parameters[odd[0]].shape)}" if odd else "there are none"
        raise ModelError(
            f"{layer.name}: expected parameters stacked over {layer.num_experts} experts, but {found}; "
            "the runtime cannot shard this model family"
        )
    return list(parameters)


def shrink_to_slots(layer: MoELayer, num_slots: int) -> None:
    """Replace the stacked parameters of a meta-device module by ones for ``num_slots`` local slots."""
    for name in expert_parameter_names(layer):
        parameter = getattr(layer.experts, name)
        shape = (num_slots, *parameter.shape[1:])
        setattr(layer.experts, name, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
    layer.experts.num_experts = num_slots  # type: ignore[assignment]  # a plain attribute of the experts classes


@dataclass(frozen=True)
class ExpertShard:
    """What one rank needs to serve one layer.

    Attributes:
        layer_index: position among the MoE layers.
        slot_of_expert: local slot of each logical expert, int64 ``[E]``, -1 where this rank has none.
        rule: chooses the copy that serves.
        exchange: brings tokens and experts together.
        context: of the running forward pass.
        rank: this rank's GPU number in the plan.
    """

    layer_index: int
    slot_of_expert: torch.Tensor
    rule: DispatchRule
    exchange: Exchange
    context: StepContext
    rank: int

    def install(self, experts: nn.Module) -> None:
        """Replace the module's forward by the sharded one."""
        compute = _grouped if self._can_group(experts) else _by_pairs
        experts._is_expert_parallel = True  # type: ignore[assignment]  # Transformers then expects foreign pairs
        original = getattr(type(experts).forward, "__wrapped__", type(experts).forward)
        experts.forward = functools.partial(self.forward, experts, functools.partial(compute, original))

    def _can_group(self, experts: nn.Module) -> bool:
        """Grouped matrix products skip foreign pairs without a host round trip; Transformers has them for CUDA."""
        return self.slot_of_expert.device.type == "cuda" and hasattr(experts, "_apply_gate")

    def forward(
        self,
        experts: nn.Module,
        compute: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Drop-in for the family's own forward: same shapes and dtype in and out, padding yields zeros."""
        context = self.context
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        context.row_values, context.row_bytes = hidden.shape[1], hidden.shape[1] * hidden.element_size()
        valid = context.valid
        routes = (top_k_index, top_k_weights)
        if valid is not None:
            hidden, routes = hidden[valid], (top_k_index[valid], top_k_weights[valid])
        if context.forced_routes is not None:
            routes = context.forced_routes(self.layer_index, routes)
        if context.on_routes is not None:
            context.on_routes(self.layer_index, routes)
        local = functools.partial(self._local, experts, compute)
        output = self.exchange(hidden, routes, self.rule, local, context)
        if valid is not None:
            full = output.new_zeros((len(valid), output.shape[1]))
            full[valid] = output
            output = full
        return output.view_as(hidden_states)

    def _local(
        self,
        experts: nn.Module,
        compute: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        rows: torch.Tensor,
        gpus: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's share of the outputs, float32 ``[N, D]``: pairs served elsewhere are marked with slot -1."""
        slots = torch.where(gpus == self.rank, self.slot_of_expert[ids.long()], -1)
        return compute(experts, rows, slots, weights)


def _by_pairs(
    original: ExpertsForward, experts: nn.Module, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Call the family's own forward on the local pairs as if each were a token with one choice."""
    contributions = rows.new_zeros((*slots.shape, rows.shape[1]), dtype=torch.float32)  # [N, K, D]
    token, choice = (slots >= 0).nonzero(as_tuple=True)
    if len(token):
        pairs = original(experts, rows[token], slots[token, choice, None], weights[token, choice, None])
        contributions[token, choice] = pairs.float()
    return contributions.sum(dim=1)


def _grouped(
    original: ExpertsForward, experts: nn.Module, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Transformers' grouped matrix products, with pairs served elsewhere sorted behind the last local slot."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    num_slots: int = experts.num_experts  # type: ignore[assignment]
    if num_slots == 0 or len(rows) == 0:
        return torch.zeros_like(rows, dtype=torch.float32)
    foreign = slots < 0
    num_choices = slots.shape[1]
    pairs = grouped_mm_experts_forward(
        experts,
        rows.repeat_interleave(num_choices, dim=0),
        slots.masked_fill(foreign, num_slots).view(-1, 1),
        weights.masked_fill(foreign, 0).view(-1, 1),
    )  # [N·K, D]: one row per pair, so that the sum over the choices stays ours
    return pairs.view(len(rows), num_choices, -1).float().sum(dim=1)
