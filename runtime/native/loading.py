"""Whether a model is served natively, and bringing it up: weights, cache, graphs."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from placement.plan import PlacementPlan
from runtime.distributed import RankGroup
from runtime.errors import ModelError, one_line
from runtime.native.cache import PAGE_SIZE, PagedCache
from runtime.native.checkpoint import fill_from_checkpoint, fill_with_random
from runtime.native.families import DecoderShape, NotNativeError, read_shape
from runtime.native.forward import Decoder
from runtime.native.model import NativeModel
from runtime.native.rope import rotary_table
from runtime.native.weights import Slots, allocate
from runtime.native.worker import NativeWorker
from runtime.settings import EngineSettings
from runtime.worker_interface import ModelFacts, StepReads, eos_token_ids

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.9  # of the memory that weights leave free on a GPU; the rest is for activations
CPU_CACHE_BYTES = 4 << 30  # address space; pages take memory once they are written


def choose_native(model: str, settings: EngineSettings, group: RankGroup) -> DecoderShape | None:
    """The decoder's parameters where the native path serves this run, else None; says in the log which and why.

    Raises:
        ModelError: ``path=native`` was asked for and cannot be.
    """
    if settings.path == "universal":
        return None
    try:
        shape = _native_shape(model, settings, group)
    except NotNativeError as error:
        if settings.path == "native":
            raise ModelError(f"path=native: {error}; give path=auto or path=universal") from error
        _say(group, f"universal path: {error}")
        return None
    if settings.path == "auto" and group.device.type == "cpu":
        _say(group, "universal path: on CPUs the native one is for checking; path=native takes it")
        return None
    _say(group, f"native path: {shape.family} on {group.device.type}")
    return shape


def _say(group: RankGroup, choice: str) -> None:
    """All ranks choose alike, so one says it."""
    if group.rank == 0:
        logger.info(choice)


def _native_shape(model: str, settings: EngineSettings, group: RankGroup) -> DecoderShape:
    shape = read_shape(load_config(model))
    if group.world_size > 1:
        raise NotNativeError(f"{group.world_size} ranks; the native path serves one")
    if settings.dtype == "float16" and group.device.type == "cpu":
        raise NotNativeError("dtype=float16 on a CPU; the native path has float32 and bfloat16 there")
    return shape


def load_config(model: str) -> Any:
    """A model's Transformers configuration.

    Raises:
        ModelError: there is none that can be used.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model}: no usable config.json ({one_line(error)})") from error


def load_native(
    plan: PlacementPlan,
    model: str,
    shape: DecoderShape,
    settings: EngineSettings,
    group: RankGroup,
    capture: bool = True,
) -> NativeWorker:
    """Load this rank's weights, make the cache, and on GPUs capture the steps of all sizes (else when first needed).

    Raises:
        ModelError: the checkpoint cannot be read, or the cache does not fit.
    """
    start_s = time.perf_counter()
    config, device = load_config(model), group.device
    dtype = settings.torch_dtype(device)
    if isinstance(dtype, str):
        dtype = getattr(config, "dtype", None) or torch.bfloat16
    slots = {layer: plan.slots[index][group.rank] for index, layer in enumerate(plan.layer_ids)}
    decoder = load_decoder(model, config, shape, slots, dtype, device, settings)
    loaded_s = time.perf_counter()
    native = NativeModel(decoder, settings.max_sequences, settings.max_prefill_tokens, device.type == "cuda")
    if device.type == "cuda" and capture:
        native.capture(settings.max_sequences)
    logger.info(
        "weights in %.1f s, graphs in %.1f s; the cache holds %d tokens",
        loaded_s - start_s,
        time.perf_counter() - loaded_s,
        decoder.cache.num_tokens,
    )
    eos = eos_token_ids(_generation_config(model), config)
    facts = ModelFacts("native", shape.vocabulary, dtype, native.max_context, eos, step_reads(decoder))
    return NativeWorker(native, facts, group)


def load_decoder(
    model: str,
    config: Any,
    shape: DecoderShape,
    slots: Slots,
    dtype: torch.dtype,
    device: torch.device,
    settings: EngineSettings,
    page_size: int = PAGE_SIZE,
) -> Decoder:
    """Weights, cache and rotary table of this rank.

    Args:
        model: directory or hub id.
        config: its Transformers configuration.
        shape: what `read_shape` found in it.
        slots: for every MoE layer the logical ids this rank holds, in slot order.
        dtype: of weights and cache.
        device: of all tensors.
        settings: say where weights come from and how large the cache is.
        page_size: tokens per page of the cache.
    """
    weights, parts = allocate(shape, slots, dtype, device)
    if settings.weights == "random":
        fill_with_random(parts)
    else:
        fill_from_checkpoint(model, parts)
    tokens = settings.cache_tokens or _cache_tokens(shape, settings, dtype, device)
    cache = PagedCache(shape, -(-tokens // page_size), page_size, dtype, device)
    positions = min(shape.max_positions, cache.num_tokens)
    return Decoder(shape, weights, cache, rotary_table(config, shape, positions, device))


def step_reads(decoder: Decoder) -> StepReads:
    """What a decode step must read; of the embedding only a row per token, so nothing where it is not the head."""
    shape, weights = decoder.shape, decoder.weights
    experts = [layer.experts for layer in weights.layers if layer.experts is not None]
    held = sum(_bytes(layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias) for layer in experts)
    slots = sum(len(layer.gate_up) for layer in experts)
    others = sum(
        _bytes(layer.qkv, layer.output, *(() if layer.mlp is None else (layer.mlp.gate_up, layer.mlp.down)))
        for layer in weights.layers
    )
    others += _bytes(weights.head, *(layer.router for layer in experts))
    kv_bytes = 2 * shape.num_kv_heads * shape.head_size * decoder.cache.keys[0].element_size()
    return StepReads(held // max(1, slots), len(experts), others, kv_bytes, shape.windows)


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _cache_tokens(shape: DecoderShape, settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> int:
    """As many as memory allows and the most sequences can use."""
    useful = settings.max_sequences * (shape.max_positions + PAGE_SIZE)
    free = CPU_CACHE_BYTES
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free = int(torch.cuda.mem_get_info(device)[0] * CACHE_SHARE)
    tokens = min(useful, free // (shape.kv_values_per_token * dtype.itemsize))
    if tokens < PAGE_SIZE:
        raise ModelError(
            f"{free >> 20} MiB are left for keys and values, too few for {PAGE_SIZE} tokens; plan for more GPUs"
        )
    return tokens


def _generation_config(model: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None
