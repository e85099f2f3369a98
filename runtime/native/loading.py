"""Whether a model is served natively, and bringing it up: weights, cache, graphs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from placement.plan import PlacementPlan
from runtime.distributed import RankGroup, end_process
from runtime.errors import ModelError, one_line
from runtime.load import SlotCounter
from runtime.native.cache import PAGE_SIZE, PagedCache
from runtime.native.checkpoint import fill_from_checkpoint, fill_with_random
from runtime.native.exchange_modes import MODES, meet
from runtime.native.families import DecoderShape, NotNativeError, read_shape
from runtime.native.forward import Decoder
from runtime.native.mla import LatentCache
from runtime.native.model import NativeModel
from runtime.native.prefill_attention import EXPANDED
from runtime.native.ranks import Ranks
from runtime.native.rope import rotary_table
from runtime.native.weights import Slots, allocate
from runtime.native.worker import NativeWorker
from runtime.settings import DTYPES, EngineSettings
from runtime.worker import local_slots
from runtime.worker_interface import ModelFacts, StepReads, eos_token_ids

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.9  # of the memory that weights and prefill leave free on a GPU
GRAPH_BYTES = 1 << 30  # for the graphs' activations, the libraries' workspaces and the kernels' code
COPIES_OF_KEYS = 8  # of `EXPANDED` numbers each, that attention of a prefill makes at most
GENERATIONS = (9, 10)  # of GPUs whose multiprocessors have the shared memory that the tiles of the products take
TRIED = 9  # the generation that the kernels have run on
CPU_CACHE_BYTES = 4 << 30  # address space; pages take memory once they are written


def choose_native(
    model: str, settings: EngineSettings, group: RankGroup, exchange: str = "allreduce"
) -> DecoderShape | None:
    """The decoder's parameters where the native path serves this run, else None; says in the log which and why.

    Args:
        model: directory or hub id.
        settings: of the run.
        group: all ranks.
        exchange: mode, which matters to several ranks.

    Raises:
        ModelError: ``path=native`` was asked for and cannot be.
    """
    if settings.path == "universal":
        return None
    try:
        shape = _native_shape(model, settings, group, exchange)
    except NotNativeError as error:
        if settings.path == "native":
            raise ModelError(f"path=native: {error}; give path=auto or path=universal") from error
        _say(group, f"universal path: {error}")
        return None
    if settings.path == "auto" and group.device.type == "cpu":
        _say(group, "universal path: on CPUs the native one is for checking; path=native takes it")
        return None
    if settings.path == "auto" and _generation(group.device) != TRIED:
        _say(group, "universal path: the native one was never run on this generation of GPUs; path=native takes it")
        return None
    _say(group, f"native path: {shape.family} on {group.device.type}")
    return shape


def _say(group: RankGroup, choice: str) -> None:
    """All ranks choose alike, so one says it."""
    if group.rank == 0:
        logger.info(choice)


def _native_shape(model: str, settings: EngineSettings, group: RankGroup, exchange: str) -> DecoderShape:
    config = load_config(model)
    shape = read_shape(config)
    if group.world_size > 1 and exchange not in MODES:
        raise NotNativeError(f"exchange {exchange} of {group.world_size} ranks; the native path has {', '.join(MODES)}")
    if settings.dtype == "float16" and group.device.type == "cpu":
        raise NotNativeError("dtype=float16 on a CPU; the native path has float32 and bfloat16 there")
    if group.device.type == "cuda":
        if settings.dtype == "auto" and getattr(config, "dtype", None) not in (None, *DTYPES.values()):
            raise NotNativeError(f"weights of {config.dtype}; the native path has {', '.join(DTYPES)}")
        if _generation(group.device) not in GENERATIONS:
            raise NotNativeError(
                f"GPU of compute capability {_generation(group.device)}.x; the kernels take "
                f"{' or '.join(f'{generation}.x' for generation in GENERATIONS)}"
            )
    return shape


def _generation(device: torch.device) -> int:
    """The major number of a GPU's compute capability."""
    return torch.cuda.get_device_capability(device)[0]


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
    exchange = settings.exchange or plan.workload.exchange
    ranks = meet(exchange, shape, group, dtype, settings.max_sequences) if group.world_size > 1 else None
    slots = local_slots(plan, group.rank)
    # Ranks go on together: on GPUs a step of one that goes on alone would wait for the others' rows without end.
    with group.together():
        decoder, fill = make_decoder(model, config, shape, slots, dtype, device, settings, ranks=ranks)
        if ranks is not None:
            ranks.place(decoder.weights, plan)
        native = NativeModel(decoder, settings.max_sequences, settings.max_prefill_tokens, device.type == "cuda")
    capture = capture and device.type == "cuda"
    with group.together(), ThreadPoolExecutor(1) as pool:
        filling = pool.submit(fill)
        if capture:  # compiling takes processors, reading takes the disk; captures bear no other work on the GPU
            _take_steps(native.compile_steps, group)
        filling.result()
    filled_s = time.perf_counter()
    if capture:
        _take_steps(native.capture, group)
    logger.info(
        "weights in %.1f s, graphs in %.1f s; the cache holds %d tokens, at most %d for one sequence",
        filled_s - start_s,
        time.perf_counter() - filled_s,
        decoder.cache.num_tokens,
        native.max_context,
    )
    eos = eos_token_ids(_generation_config(model), config)
    reads = step_reads(decoder)
    facts = ModelFacts(
        path="native",
        vocabulary=shape.vocabulary,
        dtype=dtype,
        max_context=native.max_context,
        eos_token_ids=eos,
        reads=reads,
        cache=native.cache_size,
        expert_bytes=reads.expert_bytes or None,
    )
    return NativeWorker(native, facts, group)


def _take_steps(steps: Callable[[], None], group: RankGroup) -> None:
    """Run steps that all ranks take; a rank that cannot ends, since the others' GPUs wait for its rows without end."""
    try:
        steps()
    except torch.OutOfMemoryError as error:
        if group.world_size == 1:
            raise
        end_process(group.rank, f"no memory for the steps' graphs ({one_line(error)[:200]}); lower cache_tokens")


def make_decoder(
    model: str,
    config: Any,
    shape: DecoderShape,
    slots: Slots,
    dtype: torch.dtype,
    device: torch.device,
    settings: EngineSettings,
    page_size: int = PAGE_SIZE,
    ranks: Ranks | None = None,
) -> tuple[Decoder, Callable[[], None]]:
    """Cache, rotary table and weights of this rank, all zero, and what reads or draws the weights.

    Args:
        model: directory or hub id.
        config: its Transformers configuration.
        shape: what `read_shape` found in it.
        slots: for every MoE layer the logical ids this rank holds, in slot order.
        dtype: of weights and cache.
        device: of all tensors.
        settings: say where weights come from and how large the cache is.
        page_size: tokens per page of the cache.
        ranks: that share the decoder; None where this one has all.
    """
    if ranks is not None:
        shape = ranks.share.shape_of(shape)
    with nullcontext() if ranks is None else ranks.group.together():
        weights, parts = allocate(shape, slots, dtype, device)
        free_bytes = 0 if settings.cache_tokens else _free_bytes(shape, settings, dtype, device, ranks)
        tokens = settings.cache_tokens or cache_tokens(shape, settings, dtype, free_bytes)
    if ranks is not None:
        parts = [ranks.share.part_of(part) for part in parts]
        tokens = ranks.least(tokens)
    try:
        kind = PagedCache if shape.latent is None else LatentCache
        cache = kind(shape, -(-tokens // page_size), page_size, dtype, device)
    except RuntimeError as error:  # out of memory, or beyond what an address can be
        size = tokens * shape.kv_values_per_token * dtype.itemsize >> 20
        raise ModelError(f"cache_tokens={tokens}: {size} MiB of keys and values do not fit; give fewer") from error
    positions = min(shape.max_positions, cache.num_tokens)
    counter = (
        SlotCounter(sum(shape.moe_layers), max(map(len, slots.values())), device) if any(shape.moe_layers) else None
    )
    decoder = Decoder(shape, weights, cache, rotary_table(config, shape, positions, device), ranks=ranks, load=counter)
    if settings.weights == "random":
        return decoder, lambda: fill_with_random(parts)
    return decoder, lambda: fill_from_checkpoint(model, parts)


def step_reads(decoder: Decoder) -> StepReads:
    """What a decode step must read; of the embedding only a row per token, so nothing where it is not the head."""
    shape, weights = decoder.shape, decoder.weights
    experts = [layer.experts for layer in weights.layers if layer.experts is not None]
    held = sum(_bytes(layer.gate_up, layer.gate_up_bias, layer.down, layer.down_bias) for layer in experts)
    slots = sum(len(layer.gate_up) for layer in experts)
    others = sum(
        _bytes(layer.qkv, layer.q_up, layer.kv_up, layer.output)
        + (0 if layer.mlp is None else _bytes(layer.mlp.gate_up, layer.mlp.down))
        for layer in weights.layers
    )
    others += _bytes(weights.head, *(layer.router for layer in experts))
    kv_bytes = shape.kv_values_per_layer * weights.embedding.element_size()
    return StepReads(held // max(1, slots), len(experts), others, kv_bytes, shape.windows)


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def cache_tokens(shape: DecoderShape, settings: EngineSettings, dtype: torch.dtype, free_bytes: int) -> int:
    """As many as so much memory holds and the most sequences can use.

    Raises:
        ModelError: not even a page fits.
    """
    useful = settings.max_sequences * (shape.max_positions + PAGE_SIZE)
    tokens = min(useful, free_bytes // (shape.kv_values_per_token * dtype.itemsize))
    if tokens < PAGE_SIZE:
        raise ModelError(
            f"{max(free_bytes, 0) >> 20} MiB are left for keys and values, too few for {PAGE_SIZE} tokens; plan for "
            "more GPUs, or lower max_prefill_tokens"
        )
    return tokens


def prefill_bytes(shape: DecoderShape, settings: EngineSettings, dtype: torch.dtype, ranks: Ranks | None = None) -> int:
    """Activations of the largest prefill pass: of its tokens in one layer, and of its attention."""
    dense_width = max(shape.shared_width, 0 if all(shape.moe_layers) else shape.dense_width)
    per_token = 2 * shape.qkv_width + 6 * shape.width + 3 * dense_width
    of_experts = shape.top_k * (shape.expert_width + shape.width)
    if ranks is not None and ranks.splits_rows:  # all tokens may be one rank's, and the others then have as many rows
        of_experts = ranks.group.world_size * (of_experts + 4 * shape.width)
    per_token += of_experts
    return (settings.max_prefill_tokens * per_token + COPIES_OF_KEYS * EXPANDED) * dtype.itemsize


def _free_bytes(
    shape: DecoderShape, settings: EngineSettings, dtype: torch.dtype, device: torch.device, ranks: Ranks | None
) -> int:
    """What keys and values may take."""
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # what loading has left
    free = torch.cuda.mem_get_info(device)[0] - GRAPH_BYTES - prefill_bytes(shape, settings, dtype, ranks)
    return int(free * CACHE_SHARE)


def _generation_config(model: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return None
