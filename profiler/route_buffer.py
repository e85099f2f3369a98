"""Holds what experts are called with until enough stands together to be sorted and moved to the host at once.

A decode step calls the experts of every layer with a few rows: sorting, converting and copying each call on its own
would add a handful of kernel launches to every layer, keeping references adds none. Transformers makes the tensors of
every call anew and does not write into them afterwards, so that they can wait. What waits is bounded in bytes, and so
is the memory that sorting it takes, whatever the batch and its length.

Shape suffixes: B prompts of a batch, S positions of the padded batch, N tokens of one call, M rows of many calls, C
columns, K choices per token.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from profiler.errors import ModelError
from profiler.seam import MoELayer

# On each device. Sorting takes about five times as much for a moment.
MOST_WAITING_BYTES = 32 << 20
# What CUDA's caching allocator rounds small tensors up to; a decode step of one prompt holds little else.
ALLOCATION_BYTES = 512

Call = tuple[torch.Tensor, torch.Tensor]


def call_reader(layer: MoELayer) -> Callable[[tuple[Any, ...], dict[str, Any]], Call]:
    """What reads indices and weights, both ``[N, K]``, from the arguments of a layer's experts, however they are given.

    The reader raises ModelError where they are not one row of choices per token.
    """
    names = list(inspect.signature(type(layer.experts).forward).parameters)[1:4]

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given = dict(zip(names, args, strict=False)) | kwargs
        return check_call(layer, given[names[1]], given[names[2]])

    return read


def check_call(layer: MoELayer, experts_NK: torch.Tensor, weights_NK: torch.Tensor) -> Call:
    """Indices and weights as they are, if they are one row of choices per token.

    Raises:
        ModelError: they are not.
    """
    shape = (len(experts_NK), layer.top_k)
    if experts_NK.dtype.is_floating_point or experts_NK.shape != shape or weights_NK.shape != shape:
        raise ModelError(
            f"{layer.name} is called with indices {list(experts_NK.shape)} and weights {list(weights_NK.shape)}, "
            f"expected [tokens, {layer.top_k}]; this model cannot be recorded"
        )
    return experts_NK, weights_NK


class RouteBuffer:
    """Collects the calls of several columns, such as the MoE layers of a model.

    Args:
        names: of the columns, for messages.
        top_k: choices per token (K).
    """

    def __init__(self, names: Sequence[str], top_k: int) -> None:
        self._names = names
        self._top_k = top_k
        self._waiting: defaultdict[torch.device, list[tuple[int, Call]]] = defaultdict(list)
        self._waiting_bytes: defaultdict[torch.device, int] = defaultdict(int)
        self._moved: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in names]

    def add(self, column: int, call: Call) -> None:
        """Keep one call, by reference: nothing may write into it any more.

        Args:
            column: where it belongs.
            call: indices, integer, and weights, floating point, both ``[N, K]`` and on one device.
        """
        experts_NK, weights_NK = call
        device = experts_NK.device
        self._waiting[device].append((column, (experts_NK, weights_NK.detach())))
        for tensor in call:  # a view keeps all that it is a view of
            self._waiting_bytes[device] += max(tensor.untyped_storage().nbytes(), ALLOCATION_BYTES)
        if self._waiting_bytes[device] > MOST_WAITING_BYTES:
            self._move(device)

    def _move(self, device: torch.device) -> None:
        """Sort what waits on a device by falling weight, and move it to the host."""
        waiting = self._waiting.pop(device)
        del self._waiting_bytes[device]
        # Sorted as float32, because float16 may round different weights to equal ones; stable, so that experts of
        # equal weight keep the router's order.
        weights_MK = torch.cat([weights for _, (_, weights) in waiting]).float()
        weights_MK, order_MK = weights_MK.sort(dim=1, descending=True, stable=True)
        experts_MK = torch.cat([experts for _, (experts, _) in waiting]).gather(1, order_MK).to(torch.int32)
        experts, weights = experts_MK.cpu().numpy(), weights_MK.half().cpu().numpy()
        start = 0
        for column, (call, _) in waiting:
            stop = start + len(call)
            self._moved[column].append((experts[start:stop], weights[start:stop]))
            start = stop

    def take(self, batch_size: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Hand over what was kept since the last call, in the order of positions.

        Args:
            batch_size: prompts per batch (B); every call holds as many positions of each, prompt after prompt.
            positions: padded positions that were fed (S).

        Returns:
            Expert ids int32 and weights float16, both ``[B, S, C, K]``, sorted by falling weight.

        Raises:
            ModelError: a column did not get every position of every prompt exactly once.
        """
        for device in list(self._waiting):
            self._move(device)
        shape = (batch_size, positions, len(self._names), self._top_k)
        experts_BSCK, weights_BSCK = np.empty(shape, np.int32), np.empty(shape, np.float16)
        for column, (name, calls) in enumerate(zip(self._names, self._moved, strict=True)):
            tokens = sum(len(experts) for experts, _ in calls)
            if tokens != batch_size * positions or any(len(experts) % batch_size for experts, _ in calls):
                raise ModelError(
                    f"{name} saw {tokens} tokens, expected {batch_size} x {positions}; this model cannot be recorded"
                )
            start = 0
            for experts, weights in calls:
                stop = start + len(experts) // batch_size
                experts_BSCK[:, start:stop, column] = experts.reshape(batch_size, stop - start, self._top_k)
                weights_BSCK[:, start:stop, column] = weights.reshape(batch_size, stop - start, self._top_k)
                start = stop
            calls.clear()
        return experts_BSCK, weights_BSCK
