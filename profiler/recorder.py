"""Records the routes of batches of prompts while Transformers' own ``generate`` runs them.

Every forward pass runs eagerly: ``generate`` is told not to compile. Hooks are Python, which CUDA graphs would not run;
the routes of decode steps under CUDA graphs are therefore not recorded. They are the same up to rounding.

Shape suffixes: B prompts of a batch, S positions of the padded batch, N = B x S tokens of one call, T tokens of one
sequence, L MoE layers, K choices per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from profiler.errors import ModelError
from profiler.gate_ahead import GateAhead
from profiler.route_buffer import RouteBuffer, call_reader
from profiler.seam import MoELayer, find_moe_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

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
        gate_ahead: int32 ``[T, L - 1, K]``, at l what MoE layer l + 1 would choose given the gate input of layer l,
            sorted by falling weight; None where that was not recorded.
    """

    experts: np.ndarray
    weights: np.ndarray
    token_ids: np.ndarray
    decode: np.ndarray
    gate_ahead: np.ndarray | None = None


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
        self._buffer = RouteBuffer([layer.name for layer in layers], layers[0].top_k)

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
        read = call_reader(self.layers[index])

        def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._buffer.add(index, read(args, kwargs))
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
        return self._buffer.take(batch_size, positions)


@torch.inference_mode()
def record_routes(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    gate_ahead: bool = False,
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
        gate_ahead: also record what every MoE layer but the first would choose one layer early.
        on_forward: called once per forward pass.

    Yields:
        One record per prompt.

    Raises:
        ModelError: the model has no MoE layer, or routes in a way that a trace cannot hold, such as by NaN; or
            ``gate_ahead`` is asked of a model whose gates cannot be asked ahead.
    """
    layers = find_moe_layers(model)
    _tell_about_compilation(model)
    torch.manual_seed(seed)
    asking = GateAhead(model, layers) if gate_ahead else nullcontext()
    with RouteRecorder(layers, on_forward) as recorder, asking as ahead:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            token_ids_BS = generate_batch(model, batch, max_new_tokens, temperature)
            positions = token_ids_BS.shape[1] - 1
            experts_BSLK, weights_BSLK = recorder.take(len(batch), positions)
            ahead_BSLK = ahead.take(len(batch), positions) if ahead else None
            padded_prompt = max(len(prompt) for prompt in batch)
            for row, prompt in enumerate(batch):
                first = padded_prompt - len(prompt)
                fed = slice(first, padded_prompt + _num_generated(model, token_ids_BS[row, padded_prompt:]) - 1)
                experts_TLK, weights_TLK = experts_BSLK[row, fed], weights_BSLK[row, fed]
                _require_finite(weights_TLK, start + row, layers)
                yield SequenceRoutes(
                    experts=experts_TLK,
                    weights=weights_TLK,
                    token_ids=token_ids_BS[row, fed],
                    decode=np.arange(len(experts_TLK)) >= len(prompt),
                    gate_ahead=None if ahead_BSLK is None else ahead_BSLK[row, fed],
                )


def _require_finite(weights_TLK: np.ndarray, prompt: int, layers: Sequence[MoELayer]) -> None:
    """Refuse routes by weights that are no numbers: the experts chosen by them mean nothing."""
    sound_TL = np.isfinite(weights_TLK).all(axis=2)
    if not sound_TL.all():
        token, layer = np.argwhere(~sound_TL)[0]
        raise ModelError(
            f"{layers[layer].name} weighs the experts of token {token} of prompt {prompt} by "
            f"{weights_TLK[token, layer].tolist()}, expected finite numbers; try dtype=float32, or check the weights"
        )


def _tell_about_compilation(model: PreTrainedModel) -> None:
    from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS

    settings = model.generation_config
    cache, compiled = settings.cache_implementation, getattr(settings, "compile_config", None) is not None
    if compiled or (cache is not None and cache in ALL_STATIC_CACHE_IMPLEMENTATIONS):
        asked = "compilation" if compiled else f"a {cache} cache, which is compiled,"
        logger.warning(
            "the model's generation settings ask for %s: routes are recorded with compilation off, so decode steps run "
            "eagerly and not under CUDA graphs",
            asked,
        )


def generate_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.0
) -> np.ndarray:
    """Run one batch as it is recorded, whether a recorder is entered or not.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids of each prompt, at least one each.
        max_new_tokens: tokens generated per prompt, unless all end before.
        temperature: 0 takes the likeliest token, anything above samples.

    Returns:
        Prompts and continuations, int64 ``[B, S + 1]``, padded on the left, and on the right after an end token.
    """
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
