"""Asks every MoE layer's gate, one layer early, which experts it would choose: what Fate prefetches by.

While layer l routes its tokens, the next MoE layer's gate is shown the same input. Nothing is known of gates beyond
the seam: families differ in what a gate is given and returns, some add biases that belong to the block, and some
normalise or reshape first. So the next block as a whole is called with the input of this one, and the call is
abandoned where it reaches its experts, with the choice in hand. Shared experts that a family computes before its gate
are computed once more for it; routed experts never are.

A few families (Gemma 4) have no block: gate and experts are parts of the decoder layer. There the next gate is called
with this gate's input, and returns the choice.

Source: Fate: Fast Edge Inference of Mixture-of-Experts Models via Cross-Layer Gate, https://arxiv.org/abs/2502.12224
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from profiler.errors import ModelError
from profiler.route_buffer import RouteBuffer, call_reader, check_call
from profiler.seam import MoELayer

GATE_NAMES = ("router", "gate")

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class _Answered(Exception):
    """Leaves a block that was only asked for its choice."""


def require_two_layers(layers: Sequence[MoELayer]) -> None:
    """Refuse a model in which no MoE layer follows another.

    Raises:
        ModelError: the model has one MoE layer.
    """
    if len(layers) < 2:
        raise ModelError(
            f"gate_ahead=true: the model has one MoE layer ({layers[0].name}), expected two or more: the next layer's "
            "gate is asked; leave gate_ahead out"
        )


class GateAhead:
    """While entered, keeps what every MoE layer but the first would choose, given the gate input of the one before.

    Dense layers between two MoE layers are skipped. Recorders of the experts' calls do not see the questions.

    Args:
        model: the model, in evaluation mode.
        layers: its MoE layers, two or more, all with the same number of experts and choices.

    Raises:
        ModelError: the model has one MoE layer, or its gates cannot be found.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer]) -> None:
        require_two_layers(layers)
        self._layers = layers
        self._askable = [_find_askable(model, layer) for layer in layers]
        self._buffer = RouteBuffer([f"{layer.name}, asked ahead," for layer in layers[1:]], layers[0].top_k)
        self._handles: list[RemovableHandle] = []
        self._asking = False

    def __enter__(self) -> GateAhead:
        for index in range(len(self._layers) - 1):
            ask, answer = self._make_ask(index), self._make_answer(index)
            self._handles += [
                self._askable[index].register_forward_pre_hook(ask, with_kwargs=True),
                # Before any recorder's hook, which then does not see the question.
                self._layers[index + 1].experts.register_forward_pre_hook(answer, with_kwargs=True, prepend=True),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _make_ask(self, index: int) -> Hook:
        following, layer = self._askable[index + 1], self._layers[index + 1]

        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._asking:  # the block that is asked has this hook as well
                return
            self._asking = True
            try:
                output = following(*args, **kwargs)
            except _Answered:
                return
            finally:
                self._asking = False
            self._buffer.add(index, _choice_in(layer, output))

        return ask

    def _make_answer(self, index: int) -> Hook:
        read = call_reader(self._layers[index + 1])

        def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._asking:
                self._buffer.add(index, read(args, kwargs))
                raise _Answered

        return answer

    def take(self, batch_size: int, positions: int) -> np.ndarray:
        """Hand over the choices since the last call, in the order of positions.

        Args:
            batch_size: prompts per batch (B).
            positions: padded positions that were fed (S).

        Returns:
            int32 ``[B, S, L - 1, K]``, sorted by falling weight: at l what MoE layer l + 1 would choose.

        Raises:
            ModelError: a layer was not asked about every position of every prompt exactly once.
        """
        return self._buffer.take(batch_size, positions)[0]


def _find_askable(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The block around the experts, or their gate where the decoder layer itself is around them."""
    parent_name = layer.name.rpartition(".")[0]
    parent = model.get_submodule(parent_name)
    if not parent_name.rpartition(".")[2].isdigit():
        return parent
    for name in GATE_NAMES:
        if isinstance(gate := getattr(parent, name, None), nn.Module):
            return gate
    raise ModelError(
        f"gate_ahead=true: {parent_name} has experts but neither a block around them nor a gate beside them, expected "
        "one of them; leave gate_ahead out"
    )


def _choice_in(layer: MoELayer, output: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights among what a gate returns: its tensors with K columns."""
    parts = output if isinstance(output, tuple) else (output,)
    choices = [part for part in parts if isinstance(part, torch.Tensor) and part.shape[1:] == (layer.top_k,)]
    indices = [part for part in choices if not part.dtype.is_floating_point]
    weights = [part for part in choices if part.dtype.is_floating_point]
    if not indices or not weights:
        raise ModelError(
            f"gate_ahead=true: the gate beside {layer.name} returns no indices and weights [tokens, {layer.top_k}]; "
            "leave gate_ahead out"
        )
    return check_call(layer, indices[-1], weights[-1])
