"""Given routes in place of the router's, step by step, in buffers that a CUDA graph can read.

Shape legend: S steps, L MoE layers, T sequences, B rows of a step, K choices per token.
"""

from __future__ import annotations

import torch

from kernels.route import Routes
from runtime.native.forward import Decoder


class ReplayedRoutes:
    """Replaces the experts that rows are sent to; the router's weights stay, largest first.

    Args:
        decoder: whose routes are replaced.
        routes: logical ids, int32 ``[S, L, T, K]``.
        num_rows: B, at least T; further rows repeat the first.
    """

    def __init__(self, decoder: Decoder, routes: torch.Tensor, num_rows: int) -> None:
        device = decoder.rotary.device
        padding = routes[:, :, :1].expand(-1, -1, num_rows - routes.shape[2], -1)
        self._ids = torch.cat([routes, padding], dim=2).to(device)
        layers = [number for number, routed in enumerate(decoder.shape.moe_layers) if routed]
        self._place = {layer: index for index, layer in enumerate(layers)}
        tables = [decoder.weights.layers[layer].experts for layer in layers]
        self._slots = torch.stack(
            [table.slot_of_expert[self._ids[:, i].long()] for i, table in enumerate(tables) if table is not None], dim=1
        )
        self._step = 0
        self._now = (self._ids[0].clone(), self._slots[0].clone())

    def advance(self) -> None:
        """Make the next step's routes the current ones."""
        self._now[0].copy_(self._ids[self._step])
        self._now[1].copy_(self._slots[self._step])
        self._step += 1

    def __call__(self, layer: int, routes: Routes) -> Routes:
        """The current step's routes of a layer."""
        index = self._place[layer]
        return Routes(self._now[0][index], self._now[1][index], routes.weights)
