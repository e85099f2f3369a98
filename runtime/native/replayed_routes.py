"""Given routes in place of the router's, step by step, in one buffer that a CUDA graph can read.

Shape legend: S steps, L MoE layers, T sequences, B rows of a step, K choices per token, P local slots.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import pad

from kernels.level_dispatch import level_slots
from kernels.permute import Permutation, permute
from kernels.route import Routes
from runtime.native.forward import Decoder

ALIGNMENT = 32  # int32 numbers, so that every part begins where kernels read fastest


class ReplayedRoutes:
    """Replaces the experts that rows are sent to; the router's weights stay, largest first.

    A step launches the same kernels as with the router's own choice, and one copy before them.

    Args:
        decoder: whose routes are replaced.
        routes: logical ids, int32 ``[S, L, T, K]``.
        num_rows: B, at least T; further rows repeat the first.
    """

    def __init__(self, decoder: Decoder, routes: torch.Tensor, num_rows: int) -> None:
        padding = routes[:, :, :1].expand(-1, -1, num_rows - routes.shape[2], -1)
        ids = torch.cat([routes, padding], dim=2).to(decoder.rotary.device)
        layers = [number for number, routed in enumerate(decoder.shape.moe_layers) if routed]
        found = [
            _prepare(decoder, layer, step_ids) for step in ids for layer, step_ids in zip(layers, step, strict=True)
        ]
        rows = [pad(tensor.flatten(), (0, -tensor.numel() % ALIGNMENT)) for parts in found for tensor in parts]
        self._steps = torch.cat(rows).view(len(routes), -1)
        self._now = self._steps[0].clone()
        self._next = 0
        views = self._now.split([len(row) for row in rows[: 4 * len(layers)]])
        parts = [
            view[: tensor.numel()].view(tensor.shape)
            for view, tensor in zip(views, itertools.chain(*found[: len(layers)]), strict=True)
        ]
        self._layers = {layer: parts[4 * index : 4 * index + 4] for index, layer in enumerate(layers)}

    def advance(self) -> None:
        """Make the next step's routes the current ones."""
        self._now.copy_(self._steps[self._next])
        self._next += 1

    def __call__(self, layer: int, routes: Routes, permutation: Permutation) -> tuple[Routes, Permutation]:
        """The current step's routes of a layer."""
        ids, slots, order, indptr = self._layers[layer]
        return Routes(ids, slots, routes.weights), Permutation(order, indptr)


class ReplayedIds:
    """Replaces the experts that this rank's rows are sent to, before the ranks gather their routes.

    Args:
        decoder: whose routes are replaced.
        routes: logical ids of this rank's sequences, int32 ``[S, L, T, K]``.
        num_rows: of the largest step; those beyond T are padding.
    """

    def __init__(self, decoder: Decoder, routes: torch.Tensor, num_rows: int) -> None:
        self._steps = pad(routes, (0, 0, 0, num_rows - routes.shape[2])).to(decoder.rotary.device)
        self._now = torch.zeros_like(self._steps[0])
        self._next = 0
        layers = [number for number, routed in enumerate(decoder.shape.moe_layers) if routed]
        self._layers = dict(zip(layers, self._now, strict=True))

    def advance(self) -> None:
        """Make the next step's experts the current ones."""
        self._now.copy_(self._steps[self._next])
        self._next += 1

    def __call__(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        """The current step's experts of a layer, as many rows as ``ids`` has."""
        return self._layers[layer][: len(ids)]


def replay(decoder: Decoder, routes: torch.Tensor | None, num_rows: int) -> ReplayedRoutes | ReplayedIds | None:
    """Let a decoder take the experts of decode steps from routes; each step is to be preceded by ``advance``.

    Args:
        decoder: whose routes are replaced.
        routes: logical ids of this rank's rows, int32 ``[S, L, T, K]``; None ends that.
        num_rows: of the steps; where ranks have rows of their own, of the largest.
    """
    decoder.replace_routes = decoder.replace_ids = None
    if routes is None:
        return None
    if decoder.ranks is not None and decoder.ranks.splits_rows:
        decoder.replace_ids = ids = ReplayedIds(decoder, routes, num_rows)
        return ids
    decoder.replace_routes = replayed = ReplayedRoutes(decoder, routes, num_rows)
    return replayed


def _prepare(decoder: Decoder, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ids, slots and permutation of a layer's routes ``[B, K]``, all int32."""
    experts = decoder.weights.layers[layer].experts
    assert experts is not None
    slots = experts.slot_of_expert[ids.long()] if experts.dispatch is None else level_slots(ids, experts.dispatch)
    permutation = permute(slots, len(experts.gate_up))
    return ids, slots, permutation.order.int(), permutation.indptr.int()
