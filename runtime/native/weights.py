"""The decoder's weights in the layout its operators read, and which checkpoint tensor fills which part of them.

Shape legend: D model width, H query heads, G kv heads, d head size, E logical experts, P local slots, F expert width,
I width of a dense or shared MLP, V vocabulary; of latent attention C latent size, r rotated and n plain entries of a
head's query, v of its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from kernels.level_dispatch import DispatchTable
from runtime.native.families import DecoderShape

Slots = Mapping[int, Sequence[int]]  # decoder layer -> logical ids of this rank's slots


@dataclass
class LayerWeights:
    """One decoder layer.

    Attributes:
        input_norm: ``[D]``.
        qkv: queries, keys and values, ``[(H+2G)·d, D]``; of latent attention the queries or what ``q_up`` takes, the
            latent vector, and the key to rotate, ``[… + C + r, D]``.
        qkv_bias: ``[(H+2G)·d]``, or None.
        q_norm: ``[d]`` or, over the whole projection, ``[H·d]``, or of the queries' latent vector; or None.
        k_norm: ``[d]`` or ``[G·d]``, or of the latent vector ``[C]``; or None.
        q_up: queries of their latent vector, ``[H·d, …]``; or None.
        kv_up: of latent attention every head's plain key and value, ``[H, n+v, C]``; or None.
        sinks: one logit per head, float32 ``[H]``; or None.
        output: ``[D, H·d]``, of latent attention ``[D, H·v]``.
        output_bias: ``[D]``, or None.
        mlp_norm: ``[D]``.
        experts: the routed experts, None in a dense layer.
        mlp: the dense layer's MLP or the shared expert; or None.
        shared_gate: ``[1, D]``, weighs the shared expert; or None.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    q_up: torch.Tensor | None
    kv_up: torch.Tensor | None
    sinks: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    experts: ExpertWeights | None
    mlp: MlpWeights | None
    shared_gate: torch.Tensor | None


@dataclass
class ExpertWeights:
    """The routed experts of one layer that this rank holds, by slot.

    Attributes:
        router: ``[E, D]``.
        router_bias: ``[E]``, or None.
        correction: of the scores where experts are chosen, float32 ``[E]``; or None.
        gate_up: gate rows first, ``[P, 2F, D]``.
        gate_up_bias: ``[P, 2F]``, or None.
        down: ``[P, D, F]``.
        down_bias: ``[P, D]``, or None.
        slot_of_expert: int32 ``[E]``, -1 where this rank has no slot for it.
        dispatch: chooses among the copies of experts; None where there is nothing to choose.
    """

    router: torch.Tensor
    router_bias: torch.Tensor | None
    correction: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    slot_of_expert: torch.Tensor
    dispatch: DispatchTable | None = None


@dataclass
class MlpWeights:
    """A gated MLP for all tokens: ``gate_up [2I, D]``, gate rows first, and ``down [D, I]``."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass
class DecoderWeights:
    """All of them; ``head`` is ``embedding`` where the model ties them.

    Attributes:
        embedding: ``[V, D]``.
        layers: by decoder layer.
        norm: the last one, ``[D]``.
        head: ``[V, D]``.
    """

    embedding: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Entries of one dimension of a checkpoint's tensor, as many as the destination has.

    Attributes:
        dimension: 0 or 1.
        start: the first one.
        total: how many the whole tensor has.
    """

    dimension: int
    start: int
    total: int


@dataclass(frozen=True)
class Part:
    """A part of the weights and where it comes from.

    Attributes:
        name: of the tensor in the checkpoint.
        destination: a view into the weights, filled in place.
        row: which expert's row of a tensor stacked over experts, None for the whole tensor.
        arrange: turns what was read into the destination's shape, None where it has it.
        piece: of the tensor, None for all of it.
    """

    name: str
    destination: torch.Tensor
    row: int | None = None
    arrange: Callable[[torch.Tensor], torch.Tensor] | None = None
    piece: Piece | None = None

    @property
    def key(self) -> str:
        """Names what is in the part, for seeds: the same for every plan and number of ranks."""
        return self.name if self.row is None else f"{self.name}.{self.row}"


def allocate(
    shape: DecoderShape, slots: Slots, dtype: torch.dtype, device: torch.device
) -> tuple[DecoderWeights, list[Part]]:
    """Make room for the weights.

    Args:
        shape: of the decoder.
        slots: for every MoE layer the logical ids this rank holds, in slot order.
        dtype: of the weights; sinks and corrections are float32.
        device: of the weights.

    Returns:
        The weights, not yet filled, and every part of them.
    """
    room = _Room(dtype, device)
    embedding = room.take("model.embed_tokens.weight", shape.vocabulary, shape.width)
    layers = [_allocate_layer(room, shape, layer, slots) for layer in range(shape.num_layers)]
    norm = room.take("model.norm.weight", shape.width)
    head = embedding if shape.tied else room.take("lm_head.weight", shape.vocabulary, shape.width)
    return DecoderWeights(embedding, layers, norm, head), room.parts


class _Room:
    """Allocates tensors and notes their parts."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.parts: list[Part] = []

    def zeros(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Not just any numbers: steps are compiled, and so run once, while the checkpoint is still being read."""
        return torch.zeros(size, dtype=dtype or self.dtype, device=self.device)

    def take(self, name: str, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that is one of the checkpoint's."""
        tensor = self.zeros(*size, dtype=dtype)
        self.parts.append(Part(name, tensor))
        return tensor

    def join(self, names: Sequence[str], rows: Sequence[int], *columns: int) -> torch.Tensor:
        """Several of the checkpoint's tensors below each other."""
        tensor = self.zeros(sum(rows), *columns)
        self.parts += [Part(name, view) for name, view in zip(names, tensor.split(list(rows)), strict=True)]
        return tensor


def _allocate_layer(room: _Room, shape: DecoderShape, layer: int, slots: Slots) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    attention, width = f"{prefix}.self_attn", shape.width
    inputs, (q_norm, k_norm) = _attention_inputs(shape), _attention_norms(shape)
    names, rows = [f"{attention}.{name}" for name in inputs], list(inputs.values())
    q_up, kv_up = _allocate_ups(room, shape, attention)
    routed = shape.moe_layers[layer]
    block = f"{prefix}.mlp"
    mlp = None
    if not routed:
        mlp = _allocate_mlp(room, block, shape.dense_width, width)
    elif shape.shared_width:
        name = "shared_expert" if shape.shared_gate else "shared_experts"
        mlp = _allocate_mlp(room, f"{block}.{name}", shape.shared_width, width)
    gated = routed and shape.shared_gate
    return LayerWeights(
        input_norm=room.take(f"{prefix}.input_layernorm.weight", width),
        qkv=room.join([f"{name}.weight" for name in names], rows, width),
        qkv_bias=room.join([f"{name}.bias" for name in names], rows) if shape.qkv_bias else None,
        q_norm=room.take(f"{attention}.{q_norm[0]}.weight", q_norm[1]) if q_norm else None,
        k_norm=room.take(f"{attention}.{k_norm[0]}.weight", k_norm[1]) if k_norm else None,
        q_up=q_up,
        kv_up=kv_up,
        sinks=room.take(f"{attention}.sinks", shape.num_heads, dtype=torch.float32) if shape.sinks else None,
        output=room.take(f"{attention}.o_proj.weight", width, shape.num_heads * shape.value_size),
        output_bias=room.take(f"{attention}.o_proj.bias", width) if shape.output_bias else None,
        mlp_norm=room.take(f"{prefix}.post_attention_layernorm.weight", width),
        experts=_allocate_experts(room, shape, prefix, slots[layer]) if routed else None,
        mlp=mlp,
        shared_gate=room.take(f"{block}.shared_expert_gate.weight", 1, width) if gated else None,
    )


def _attention_inputs(shape: DecoderShape) -> dict[str, int]:
    """The checkpoint's projections of hidden states, in the order of `LayerWeights.qkv`, and the rows of each."""
    queries, latent = shape.num_heads * shape.head_size, shape.latent
    if latent is None:
        keys = shape.num_kv_heads * shape.head_size
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    first = {"q_proj": queries} if latent.query_size is None else {"q_a_proj": latent.query_size}
    return first | {"kv_a_proj_with_mqa": latent.entry}


def _attention_norms(shape: DecoderShape) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Name and size of the queries' and the keys' norm."""
    if shape.latent is not None:
        of_queries = shape.latent.query_size
        return ("q_a_layernorm", of_queries) if of_queries else None, ("kv_a_layernorm", shape.latent.size)
    if shape.qk_norm == "none":
        return None, None
    heads = (1, 1) if shape.qk_norm == "head" else (shape.num_heads, shape.num_kv_heads)
    return ("q_norm", heads[0] * shape.head_size), ("k_norm", heads[1] * shape.head_size)


def _allocate_ups(room: _Room, shape: DecoderShape, attention: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The projections of latent vectors to queries, and to every head's key and value."""
    latent, heads = shape.latent, shape.num_heads
    if latent is None:
        return None, None
    q_up = None
    if latent.query_size is not None:
        q_up = room.take(f"{attention}.q_b_proj.weight", heads * latent.query, latent.query_size)
    kv_up = room.take(f"{attention}.kv_b_proj.weight", heads * (latent.plain + latent.value_size), latent.size)
    return q_up, kv_up.unflatten(0, (heads, -1))


def _allocate_mlp(room: _Room, prefix: str, inner: int, width: int) -> MlpWeights:
    gate_up = room.join([f"{prefix}.{name}_proj.weight" for name in ("gate", "up")], [inner, inner], width)
    return MlpWeights(gate_up, room.take(f"{prefix}.down_proj.weight", width, inner))


def _allocate_experts(room: _Room, shape: DecoderShape, prefix: str, held: Sequence[int]) -> ExpertWeights:
    inner, width = shape.expert_width, shape.width
    gate_up, down = room.zeros(len(held), 2 * inner, width), room.zeros(len(held), width, inner)
    slot_of_expert = torch.full((shape.num_experts,), -1, dtype=torch.int32)
    for slot, expert in enumerate(held):
        slot_of_expert[expert] = slot
    gate_up_bias = down_bias = None
    if shape.family == "gpt_oss":
        gate_up_bias, down_bias = room.zeros(len(held), 2 * inner), room.zeros(len(held), width)
        room.parts += _gpt_oss_parts(f"{prefix}.mlp.experts", held, (gate_up, gate_up_bias, down, down_bias))
        router = f"{prefix}.mlp.router"
    else:
        block, names = f"{prefix}.mlp", ("gate_proj", "up_proj", "down_proj")
        if shape.family == "mixtral":
            block, names = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
        router = f"{block}.gate"
        for slot, expert in enumerate(held):
            views = (gate_up[slot, :inner], gate_up[slot, inner:], down[slot])
            room.parts += [
                Part(f"{block}.experts.{expert}.{n}.weight", view) for n, view in zip(names, views, strict=True)
            ]
    return ExpertWeights(
        router=room.take(f"{router}.weight", shape.num_experts, width),
        router_bias=room.take(f"{router}.bias", shape.num_experts) if shape.moe_bias else None,
        correction=room.take(f"{router}.e_score_correction_bias", shape.num_experts, dtype=torch.float32)
        if shape.routing.corrected
        else None,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
        slot_of_expert=slot_of_expert.to(room.device),
    )


def _gpt_oss_parts(prefix: str, held: Sequence[int], tensors: tuple[torch.Tensor, ...]) -> list[Part]:
    """Stacked over experts, transposed, and with gate and up columns alternating; see Transformers' GptOssExperts."""
    gate_up, gate_up_bias, down, down_bias = tensors
    parts = []
    for slot, expert in enumerate(held):
        parts += [
            Part(f"{prefix}.gate_up_proj", gate_up[slot], expert, _gate_rows_first),
            Part(f"{prefix}.gate_up_proj_bias", gate_up_bias[slot], expert, _gate_first),
            Part(f"{prefix}.down_proj", down[slot], expert, torch.t),
            Part(f"{prefix}.down_proj_bias", down_bias[slot], expert),
        ]
    return parts


def _gate_first(alternating: torch.Tensor) -> torch.Tensor:
    """``[2F, …]`` of alternating gate and up rows → gate rows first."""
    return torch.cat([alternating[::2], alternating[1::2]])


def _gate_rows_first(alternating: torch.Tensor) -> torch.Tensor:
    return _gate_first(alternating.t())
