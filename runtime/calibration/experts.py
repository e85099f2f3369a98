"""How long a rank's experts take, by active experts and by token–expert pairs.

Shape legend: P slots of this rank, D model width, F expert width, T tokens, K choices per token.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from kernels.combine import combine
from kernels.grouped_gemm import Activation, down, gate_up
from kernels.permute import permute
from kernels.route import Routes
from runtime.calibration.timing import time_calls_us

CACHE_BYTES = 1 << 28  # several times what a cache holds: so many weights are gone through
MOST_LAYERS = {"cuda": 64, "cpu": 4}
PAIRS_EACH = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128), "cpu": (1, 4, 16)}  # of every active expert
MOST_PAIRS = 8192


@dataclass(frozen=True)
class ExpertShape:
    """The experts of one MoE layer.

    Attributes:
        slots: that one GPU holds P.
        top_k: choices per token K.
        width: of the model D.
        inner: of an expert F.
        biased: whether both products add a bias.
        activation: between them.
    """

    slots: int
    top_k: int
    width: int
    inner: int
    biased: bool
    activation: Activation


@dataclass(frozen=True)
class ExpertTime:
    """What one layer's experts took with so many active experts and pairs, in µs."""

    active: int
    pairs: int
    us: float


def time_experts(shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> list[ExpertTime]:
    """Time a layer on a grid of active experts and pairs, from few tokens to a prefill.

    Everything that a placement changes is in it: the order of the pairs, both products and the weighted sum.
    """
    layers = _Layers(shape, dtype, device)
    counts = sorted({min(1 << exponent, shape.slots) for exponent in range(shape.slots.bit_length() + 1)})
    found = []
    for active, each in itertools.product(counts, PAIRS_EACH[device.type]):
        pairs = -(-active * each // shape.top_k) * shape.top_k
        if pairs <= MOST_PAIRS:
            found.append(ExpertTime(active, pairs, layers.time_us(active, pairs)))
    return found


class _Layers:
    """Random weights of as many layers as no cache holds."""

    def __init__(self, shape: ExpertShape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        layer_bytes = 3 * shape.slots * shape.width * shape.inner * dtype.itemsize
        count = min(max(2, -(-CACHE_BYTES // layer_bytes)), MOST_LAYERS[device.type])
        self.first = [self._draw(shape.slots, 2 * shape.inner, shape.width) for _ in range(count)]
        self.second = [self._draw(shape.slots, shape.width, shape.inner) for _ in range(count)]
        self.first_bias = self._draw(shape.slots, 2 * shape.inner) if shape.biased else None
        self.second_bias = self._draw(shape.slots, shape.width) if shape.biased else None
        self.norm = self._draw(shape.width)

    def _draw(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_(0, 0.02)

    @torch.inference_mode()
    def time_us(self, active: int, pairs: int) -> float:
        """Time of one layer in which the first ``active`` slots share the pairs."""
        shape, tokens = self.shape, pairs // self.shape.top_k
        x = self._draw(tokens, shape.width)
        slots = (torch.arange(pairs, device=self.device, dtype=torch.int32) % active).view(tokens, shape.top_k)
        weights = torch.full((tokens, shape.top_k), 1 / shape.top_k, device=self.device)
        routes = Routes(slots, slots, weights)

        def run(layer: int) -> object:
            first, second = self.first[layer], self.second[layer]
            permutation = permute(slots, shape.slots)
            hidden = gate_up(x, first, permutation, shape.top_k, shape.activation, self.first_bias)
            return combine(down(hidden, second, permutation, self.second_bias), routes, None, x, self.norm, 1e-6)

        return time_calls_us([partial(run, layer) for layer in range(len(self.first))], self.device)
