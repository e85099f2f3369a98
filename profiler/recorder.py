"""Records the routes of batches of prompts while Transformers' own ``generate`` runs them.

Shape suffixes: B prompts of a batch, S positions of the padded batch, N = B x S tokens of one call, T tokens of one
sequence, L MoE layers, K choices per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from profiler.errors import ModelError
from profiler.seam import MoELayer, find_moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whatever stands at padded positions is masked and never recorded.
PADDING_TOKEN = 0


@dataclass(frozen=True)
class SequenceRoutes:
    """The routes of one prompt and its continuation, without padding; the last generated token was never fed.

    Attributes:
        experts: int32 ``[T, L, K]``, sorted by falling weight.
        weights: float16 ``[T, L, K]``.
        token_ids: int64 ``[T]``, the tokens that were fed.
        decode: bool ``[T]``, fed in a decode step.
    """

    experts: np.ndarray
    weights: np.ndarray
    token_ids: np.ndarray
    decode: np.ndarray


def require_one_shape(layers: Sequence[MoELayer]) -> None:
    """Refuse a model whose layers differ in what a trace holds once for all of them.

    Raises:
        ModelError: the layers differ in their number of experts or choices.
    """
    shapes = {(layer.num_experts, layer.top_k): layer.layer_id for layer in layers}
    if len(shapes) > 1:
        found = ", ".join(f"top-{k} of {e} in layer {layer_id}" for (e, k), layer_id in shapes.items())
        raise ModelError(f"the layers route differently ({found}), expected one shape; this model cannot be recorded")


class RouteRecorder:
    """While entered, keeps what the experts of every MoE layer are called with.

    Args:
        layers: the MoE layers of one model, all with the same number of experts and choices.
        on_forward: called whenever the first MoE layer runs.

    Raises:
        ModelError: the layers differ in their number of experts or choices.
    """

    def __init__(self, layers: Sequence[MoELayer], on_forward: Callable[[], None] = lambda: None) -> None:
        require_one_shape(layers)
        self.layers = layers
        self._on_forward = on_forward
        self._handles: list[RemovableHandle] = []
        self._calls: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in layers]

    def __enter__(self) -> RouteRecorder:
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.experts.register_forward_pre_hook(self._make_hook(index), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _make_hook(self, index: int) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        layer = self.layers[index]
        names = list(inspect.signature(type(layer.experts).forward).parameters)[1:4]

        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            experts_NK, weights_NK = given[names[1]], given[names[2]]
            shape = (len(experts_NK), layer.top_k)
            if experts_NK.dtype.is_floating_point or experts_NK.shape != shape or weights_NK.shape != shape:
                raise ModelError(
                    f"{layer.name} is called with indices {list(experts_NK.shape)} and weights "
                    f"{list(weights_NK.shape)}, expected [tokens, {layer.top_k}]; this model cannot be recorded"
                )
            # Sorted here, because float16 may round different weights to equal ones; stable, so that experts of equal
            # weight keep the router's order.
            sorted_NK, order_NK = weights_NK.detach().float().sort(dim=1, descending=True, stable=True)
            self._calls[index].append((experts_NK.gather(1, order_NK).to(torch.int32), sorted_NK.half()))
            if index == 0:
                self._on_forward()

        return keep

    def take(self, batch_size: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """Hand over what was kept since the last call, in the order of positions.

        Args:
            batch_size: prompts per batch (B).
            positions: padded positions that were fed (S).

        Returns:
            Expert ids int32 and weights float16, both ``[B, S, L, K]``.

        Raises:
            ModelError: a layer did not see every position of every prompt exactly once.
        """
        experts_LBSK: list[np.ndarray] = []
        weights_LBSK: list[np.ndarray] = []
        for layer, calls in zip(self.layers, self._calls, strict=True):
            tokens = sum(len(experts) for experts, _ in calls)
            if tokens != batch_size * positions or any(len(experts) % batch_size for experts, _ in calls):
                raise ModelError(
                    f"{layer.name} saw {tokens} tokens, expected {batch_size} x {positions}; this model cannot be "
                    "recorded"
                )
            for kept, column in ((experts_LBSK, 0), (weights_LBSK, 1)):
                parts = [call[column].view(batch_size, -1, layer.top_k) for call in calls]
                kept.append(torch.cat(parts, dim=1).cpu().numpy())
            calls.clear()
        return np.stack(experts_LBSK, axis=2), np.stack(weights_LBSK, axis=2)


@torch.inference_mode()
def record_routes(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_forward: Callable[[], None] = lambda: None,
) -> Iterator[SequenceRoutes]:
    """Run prompts in batches, padded on the left, and yield every prompt's routes in order.

    Only the routes of one batch are held at a time.

    Args:
        model: a causal language model with MoE layers, in evaluation mode.
        prompts: token ids of each prompt, at least one each.
        batch_size: prompts run together.
        max_new_tokens: tokens generated per prompt, unless it ends before.
        temperature: 0 takes the likeliest token, anything above samples.
        seed: of the sampling.
        on_forward: called once per forward pass.

    Yields:
        One record per prompt.

    Raises:
        ModelError: the model has no MoE layer, or routes in a way that a trace cannot hold.
    """
    layers = find_moe_layers(model)
    torch.manual_seed(seed)
    with RouteRecorder(layers, on_forward) as recorder:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            token_ids_BS = _generate(model, batch, max_new_tokens, temperature)
            experts_BSLK, weights_BSLK = recorder.take(len(batch), token_ids_BS.shape[1] - 1)
            padded_prompt = max(len(prompt) for prompt in batch)
            for row, prompt in enumerate(batch):
                first = padded_prompt - len(prompt)
                fed = slice(first, padded_prompt + _num_generated(model, token_ids_BS[row, padded_prompt:]) - 1)
                experts_TLK = experts_BSLK[row, fed]
                yield SequenceRoutes(
                    experts=experts_TLK,
                    weights=weights_BSLK[row, fed],
                    token_ids=token_ids_BS[row, fed],
                    decode=np.arange(len(experts_TLK)) >= len(prompt),
                )


def _generate(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float
) -> np.ndarray:
    """Prompts and continuations, int64 ``[B, S + 1]``, padded on the left, and on the right after an end token."""
    length = max(len(prompt) for prompt in prompts)
    token_ids = torch.full((len(prompts), length), PADDING_TOKEN, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    # What the model's own generation settings say about sampling would make the routes depend on more than we record.
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        token_ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        num_beams=1,
        pad_token_id=PADDING_TOKEN,
        use_cache=True,
        disable_compile=True,
        **sampling,
    )
    return output.cpu().numpy()


def _num_generated(model: PreTrainedModel, generated: np.ndarray) -> int:
    """Generated tokens up to and with the first end token; what follows it is padding."""
    ends = model.generation_config.eos_token_id
    found = np.flatnonzero(np.isin(generated, [] if ends is None else ends))
    return int(found[0]) + 1 if len(found) else len(generated)
