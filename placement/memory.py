"""Memory budgets: how many experts each GPU may hold, and what copies cost in bytes and in KV-cache tokens.

Shape suffixes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from placement.cluster import Cluster
from placement.errors import ProblemError
from placement.slots import Slots, is_int

#: Slots asked for: None, a number, a list of numbers, ``"fill"``, or ``"+25%"``; see ``slot_budget``.
SlotRequest = int | str | Sequence[int] | None
PerGpu = float | Sequence[float]  #: one number for all GPUs, or one per GPU

EXTRA_SHARE = re.compile(r"\+(\d+(?:\.\d+)?)%")
#: Kinds of layers (``layer_types`` of a configuration) that keep keys and values of every token.
ATTENTION_LAYERS = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})
#: Keys of models with other layers than attention in a pattern that only the model's own code tells.
HYBRID_KEYS = ("attn_layer_period", "attn_layer_indices", "full_attention_interval", "hybrid_override_pattern")


@dataclass(frozen=True)
class MemoryBudget:
    """Memory of the GPUs, in bytes; one number for all GPUs or one per GPU.

    Attributes:
        gpu_bytes: memory that the server may use; None takes the cluster's ``expert_memory_bytes`` for experts.
        other_weights_bytes: all weights except routed experts, and activations.
        kv_reserve_bytes: kept for the KV cache.
        kv_bytes_per_token: keys and values of one token on one GPU, over all layers; None where unknown.

    Raises:
        ProblemError: a value is out of range, or shares of ``gpu_bytes`` are given without it.
    """

    gpu_bytes: PerGpu | None = None
    other_weights_bytes: PerGpu = 0
    kv_reserve_bytes: PerGpu = 0
    kv_bytes_per_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "other_weights_bytes", "kv_reserve_bytes"):
            value = getattr(self, name)
            if value is None and name == "gpu_bytes":
                continue
            numbers = value if isinstance(value, list | tuple) and value else [value]
            if any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n < math.inf for n in numbers):
                raise ProblemError(f"memory.{name} {value!r}: expected a number of bytes of at least 0, or one per GPU")
            if self.gpu_bytes is None and any(numbers):
                raise ProblemError(f"memory.{name} {value!r} without memory.gpu_bytes: give gpu_bytes as well")
        if self.kv_bytes_per_token is not None:
            _check_positive("memory.kv_bytes_per_token", self.kv_bytes_per_token)

    def for_experts(self, cluster: Cluster) -> tuple[float, ...]:
        """Bytes for routed experts on each GPU [G].

        Raises:
            ProblemError: a list does not fit the cluster, or a GPU's other weights and reserve exceed its memory.
        """
        if self.gpu_bytes is None:
            return cluster.expert_memory_bytes
        names = ("gpu_bytes", "other_weights_bytes", "kv_reserve_bytes")
        columns = [_one_per_gpu(f"memory.{name}", getattr(self, name), cluster.num_gpus) for name in names]
        left = tuple(whole - other - reserve for whole, other, reserve in zip(*columns, strict=True))
        for gpu, remaining in enumerate(left):
            if remaining < 0:
                whole, other, reserve = (column[gpu] for column in columns)
                raise ProblemError(
                    f"GPU {gpu}: {other:.4g} bytes of other weights and {reserve:.4g} bytes of KV reserve exceed "
                    f"memory.gpu_bytes {whole:.4g}: give a smaller memory.kv_reserve_bytes, or larger GPUs"
                )
        return left


def slot_budget(
    cluster: Cluster,
    num_experts: int,
    num_layers: int,
    slots_per_gpu: SlotRequest,
    expert_bytes: int | None,
    memory: MemoryBudget | None = None,
) -> tuple[int, ...]:
    """Slots of each GPU and layer that keep to the memory of each GPU.

    Args:
        cluster: its GPUs and their memory for experts.
        num_experts, num_layers: E, L.
        slots_per_gpu: None for one copy of each expert, as even as memory allows; a number for all GPUs, or one per
            GPU; ``"fill"`` for all that memory holds (at most E); ``"+25%"`` for one copy of each and that share of E
            more (rounded down) over all GPUs, as even and as many as memory allows.
        expert_bytes: bytes of one expert in one layer, or None where unknown (then memory is not checked).
        memory: where the memory for experts follows from that of the GPUs; None takes the cluster's.

    Raises:
        ProblemError: memory does not hold what is asked for, or the request is malformed.
    """
    num_gpus = cluster.num_gpus
    if expert_bytes is not None:
        _check_positive("expert_bytes", expert_bytes)
    for_experts = cluster.expert_memory_bytes if memory is None else memory.for_experts(cluster)
    rooms = _rooms(for_experts, num_experts, num_layers, expert_bytes)
    if slots_per_gpu is None:
        return _spread(num_experts, rooms)
    if isinstance(slots_per_gpu, str):
        share = EXTRA_SHARE.fullmatch(slots_per_gpu)
        if share:
            return _spread(num_experts + int(num_experts * Fraction(share[1]) / 100), rooms)
        if slots_per_gpu == "fill":
            if expert_bytes is None:
                raise ProblemError(
                    "slots_per_gpu fill needs the size of an expert, which the trace does not tell: "
                    "record the trace with `profiler trace`, or give a number of slots_per_gpu"
                )
            return tuple(rooms)
    budget = [slots_per_gpu] * num_gpus if is_int(slots_per_gpu) else slots_per_gpu
    if not isinstance(budget, list | tuple) or len(budget) != num_gpus or not all(is_int(n) and n >= 0 for n in budget):
        raise ProblemError(
            f"slots_per_gpu {slots_per_gpu!r}: expected null, an integer of at least 0, a list of {num_gpus} of them, "
            "one per GPU, fill, or a share of copies such as +25%"
        )
    if expert_bytes is not None:
        _check_memory(budget, for_experts, num_layers, expert_bytes)
    return tuple(budget)


@dataclass(frozen=True)
class CopyPrice:
    """What copies beyond the first of each expert cost.

    Attributes:
        copies: copies beyond the first, over all layers and GPUs.
        total_bytes: their weights.
        bytes_per_gpu: the same by GPU; each of an expert's n copies counts as (n − 1)/n of one.
        kv_tokens_per_gpu: tokens whose keys and values that memory would hold, by GPU; None where unknown.
    """

    copies: int
    total_bytes: int
    bytes_per_gpu: tuple[int, ...]
    kv_tokens_per_gpu: tuple[int, ...] | None


def copy_price(
    placed: Slots | Sequence[int],
    num_experts: int,
    num_layers: int,
    expert_bytes: int,
    kv_bytes_per_token: int | None,
) -> CopyPrice:
    """Price of the copies of a plan, or of a budget as if every slot were used.

    Args:
        placed: a plan's slots, or the slots of each GPU in every layer.
        num_experts, num_layers: E, L.
        expert_bytes: bytes of one expert in one layer.
        kv_bytes_per_token: keys and values of one token on one GPU, over all layers; None where unknown.
    """
    _check_positive("expert_bytes", expert_bytes)
    if kv_bytes_per_token is not None:
        _check_positive("kv_bytes_per_token", kv_bytes_per_token)
    if is_int(placed[0]):
        per_gpu = _extra_of_budget(cast(Sequence[int], placed), num_experts, num_layers)
    else:
        per_gpu = _extra_of_plan(cast(Slots, placed), num_experts)
    copies = round(sum(per_gpu))
    bytes_per_gpu = tuple(round(extra * expert_bytes) for extra in per_gpu)
    tokens = None if kv_bytes_per_token is None else tuple(size // kv_bytes_per_token for size in bytes_per_gpu)
    return CopyPrice(copies, copies * expert_bytes, bytes_per_gpu, tokens)


def describe_price(price: CopyPrice) -> str:
    """One line for people."""
    if not price.copies:
        return "copies: none, every expert stands once"
    line = (
        f"copies: {price.copies} beyond one of each expert take {price.total_bytes / 1e9:.3g} GB, "
        f"{max(price.bytes_per_gpu) / 1e9:.3g} GB on the GPU with most"
    )
    if price.kv_tokens_per_gpu is None:
        return f"{line} (give memory.kv_bytes_per_token to see it in KV-cache tokens)"
    least, total = min(price.kv_tokens_per_gpu), sum(price.kv_tokens_per_gpu)
    return f"{line}: memory for {total:,} KV-cache tokens in all, at least {least:,} on every GPU"


def kv_bytes_per_token(config: Mapping[str, Any], dtype_bytes: float) -> int | None:
    """Bytes of one token's keys and values over all layers, from a Hugging Face ``config.json``.

    Layers with a sliding window count like full attention: they save memory in long contexts alone.

    Args:
        config: the parsed file; the part ``text_config`` of multimodal models is found.
        dtype_bytes: bytes of one number in the cache, for example 2 for bfloat16.

    Returns:
        The bytes for one whole copy of the cache, or None where the configuration does not tell.
    """
    if isinstance(dtype_bytes, bool) or not isinstance(dtype_bytes, int | float) or not 0 < dtype_bytes < math.inf:
        raise ProblemError(f"dtype_bytes {dtype_bytes!r}: expected a number above 0, for example 2 for bfloat16")
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    layers = _attention_layers(config)
    rank, rope = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if is_int(rank) and is_int(rope):  # multi-head latent attention: one compressed vector for keys and values
        numbers = rank + rope
    else:
        heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim")
        if head_dim is None and is_int(hidden) and is_int(heads) and heads > 0:
            head_dim = hidden // heads
        numbers = 2 * kv_heads * head_dim if is_int(kv_heads) and is_int(head_dim) else 0
    return math.ceil(layers * numbers * dtype_bytes) if layers and numbers > 0 else None


def _attention_layers(config: Mapping[str, Any]) -> int | None:
    """Layers with a KV cache, or None where the configuration does not tell."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list | tuple):
        return sum(kind in ATTENTION_LAYERS for kind in kinds)
    layers = config.get("num_hidden_layers")
    if not is_int(layers) or any(config.get(key) for key in HYBRID_KEYS):
        return None
    return layers


def _rooms(for_experts: Sequence[float], num_experts: int, num_layers: int, expert_bytes: int | None) -> list[int]:
    """Slots that each GPU's memory holds, at most E; E where the size of an expert is unknown."""
    if expert_bytes is None:
        return [num_experts] * len(for_experts)
    slot_bytes = expert_bytes * num_layers
    rooms = [min(num_experts, int(memory // slot_bytes)) for memory in for_experts]
    if sum(rooms) < num_experts:
        raise ProblemError(
            f"the memory for experts of all {len(rooms)} GPUs has room for {sum(rooms)} slots of "
            f"{slot_bytes:.4g} bytes ({num_layers} layers), one copy of each expert takes {num_experts}: give more "
            "GPUs or memory (cluster.expert_memory_bytes, a smaller memory.kv_reserve_bytes), or a smaller dtype"
        )
    return rooms


def _check_memory(budget: Sequence[int], for_experts: Sequence[float], num_layers: int, expert_bytes: int) -> None:
    slot_bytes = expert_bytes * num_layers
    for gpu, (slots, memory) in enumerate(zip(budget, for_experts, strict=True)):
        if slots * slot_bytes > memory:
            raise ProblemError(
                f"GPU {gpu} has {memory:.4g} bytes for experts, room for {memory // slot_bytes:.0f} slots; "
                f"{slots} slots in {num_layers} layers need {slots * slot_bytes:.4g} bytes: give fewer slots_per_gpu "
                "(fill takes as many as fit), more cluster.expert_memory_bytes, or more GPUs"
            )


def _spread(total: int, rooms: Sequence[int]) -> tuple[int, ...]:
    """``total`` slots (or all there is room for) as evenly as rooms allow; the first GPUs take one more."""
    level = bisect_right(range(max(rooms) + 1), total, key=lambda level: sum(min(room, level) for room in rooms)) - 1
    slots = [min(room, level) for room in rooms]
    left = total - sum(slots)
    for gpu, room in enumerate(rooms):
        if left and room > level:
            slots[gpu] += 1
            left -= 1
    return tuple(slots)


def _extra_of_plan(slots: Slots, num_experts: int) -> list[float]:
    """Copies beyond the first on each GPU over all layers: (n − 1)/n for every expert held that has n copies."""
    per_gpu = [0.0] * len(slots[0])
    for layer in slots:
        counts = [0] * num_experts
        for expert in (expert for held in layer for expert in held):
            counts[expert] += 1
        for gpu, held in enumerate(layer):
            per_gpu[gpu] += sum(1 - 1 / counts[expert] for expert in held)
    return per_gpu


def _extra_of_budget(slots_per_gpu: Sequence[int], num_experts: int, num_layers: int) -> list[float]:
    """The same as if every slot were used, and the share of copies the same on every GPU."""
    total = sum(slots_per_gpu)
    return [slots * num_layers * max(0, total - num_experts) / max(1, total) for slots in slots_per_gpu]


def _one_per_gpu(name: str, value: PerGpu, num_gpus: int) -> tuple[float, ...]:
    if isinstance(value, int | float):
        return (value,) * num_gpus
    if len(value) != num_gpus:
        raise ProblemError(f"{name} has {len(value)} numbers for {num_gpus} GPUs: give one for all, or one per GPU")
    return tuple(value)


def _check_positive(name: str, value: object) -> None:
    if not is_int(value) or value < 1:
        raise ProblemError(f"{name} {value!r}: expected an integer number of bytes of at least 1")
