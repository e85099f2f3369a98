"""What the native decoder must know of a model, read from its Hugging Face configuration.

All families are one decoder with other settings; a configuration that asks for more than the decoder does is refused
with the reason, and the universal path serves it.

Shape legend: D model width, F expert width, E logical experts, K choices per token, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from runtime.errors import ModelError
from runtime.native import deepseek
from runtime.native.deepseek import LatentShape, Routing

HEAD_SIZES = (8, 16, 32, 64, 128, 256)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class NotNativeError(ModelError):
    """The native decoder does not serve this model; the universal path may."""


@dataclass(frozen=True)
class DecoderShape:
    """The parameters of a model's decoder.

    Attributes:
        family: Transformers' ``model_type``.
        width: D.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_size: d, of a query.
        vocabulary: tokens known to the embedding and the head.
        max_positions: of the rotary embedding.
        eps: of every RMSNorm.
        num_experts: E.
        top_k: K.
        expert_width: F.
        moe_layers: per decoder layer, whether its experts are routed (else it is one dense MLP).
        dense_width: of the dense MLPs.
        renormalise: whether the chosen experts' weights are scaled to the sum 1.
        activation: between the two expert products, as `kernels.grouped_gemm` names it.
        qk_norm: RMSNorm of queries and keys, per head or over the whole projection.
        windows: per decoder layer, the last so many positions that it attends to, or None for all.
        sinks: whether every head has a learned logit that takes part in the softmax alone.
        qkv_bias: biases of the three attention inputs.
        output_bias: bias of the attention output.
        moe_bias: biases of router and experts.
        shared_width: of the expert that serves every token; 0 where there is none.
        shared_gate: whether a sigmoid gate weighs its output.
        tied: whether embedding and head are one tensor.
        latent: latent attention, None where keys and values are cached.
        routing: of the routers.
    """

    family: str
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary: int
    max_positions: int
    eps: float
    num_experts: int
    top_k: int
    expert_width: int
    moe_layers: tuple[bool, ...]
    dense_width: int
    renormalise: bool
    activation: Literal["silu", "gpt_oss"] = "silu"
    qk_norm: Literal["none", "head", "projection"] = "none"
    windows: tuple[int | None, ...] = ()
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    moe_bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    tied: bool = False
    latent: LatentShape | None = None
    routing: Routing = field(default_factory=Routing)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.moe_layers)

    @property
    def qkv_width(self) -> int:
        """Columns of queries and of what keys and values are made of."""
        return self.num_heads * self.head_size + self.kv_values_per_layer

    @property
    def kv_values_per_layer(self) -> int:
        """Numbers cached for one token in one layer."""
        return 2 * self.num_kv_heads * self.head_size if self.latent is None else self.latent.entry

    @property
    def value_size(self) -> int:
        """Entries of a head's value."""
        return self.head_size if self.latent is None else self.latent.value_size

    @property
    def kv_values_per_token(self) -> int:
        """Numbers cached for one token over all layers."""
        return self.num_layers * self.kv_values_per_layer

    @property
    def rotated(self) -> int:
        """Entries of a head that the rotary embedding turns."""
        return self.head_size if self.latent is None else self.latent.rotated

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return float(self.head_size**-0.5) if self.latent is None else self.latent.scale


def read_shape(config: Any) -> DecoderShape:
    """The decoder's parameters for a Transformers configuration.

    Raises:
        NotNativeError: the native decoder does not serve such a model; the message says why.
    """
    family = str(config.model_type)
    if family not in _READERS:
        raise NotNativeError(f"family {family}: the native decoder serves {', '.join(_READERS)}")
    if getattr(config, "quantization_config", None) is not None:
        raise NotNativeError(f"{family}: quantized checkpoints; the native decoder reads bfloat16, float16 and float32")
    shape = _READERS[family](config, _common(config))
    rope = config.rope_parameters
    for name, value, fits, expected in (
        *(deepseek.limits(config) if shape.latent else [_head_size_limit(shape)]),
        ("rope type", rope["rope_type"], rope["rope_type"] in ROPE_TYPES, f"one of {', '.join(ROPE_TYPES)}"),
        ("partial rotary factor", rope.get("partial_rotary_factor"), rope.get("partial_rotary_factor", 1) == 1, "1"),
        ("hidden_act", config.hidden_act, config.hidden_act == "silu", "silu"),
        ("heads per kv head", shape.num_heads, shape.num_heads % shape.num_kv_heads == 0, "a whole number"),
    ):
        if not fits:
            raise NotNativeError(f"{family} with {name} {value}: the native decoder expects {expected}")
    return shape


def _head_size_limit(shape: DecoderShape) -> tuple[str, object, bool, str]:
    return "head size", shape.head_size, shape.head_size in HEAD_SIZES, f"one of {HEAD_SIZES}"


def _common(config: Any) -> DecoderShape:
    """What all families name alike; routed experts in every layer, attention over all positions."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    return DecoderShape(
        family=config.model_type,
        width=config.hidden_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        num_experts=experts,
        top_k=config.num_experts_per_tok,
        expert_width=config.intermediate_size,
        moe_layers=(True,) * layers,
        dense_width=config.intermediate_size,
        renormalise=bool(getattr(config, "norm_topk_prob", True)),
        windows=(None,) * layers,
        tied=bool(config.tie_word_embeddings),
    )


def _mixtral(config: Any, shape: DecoderShape) -> DecoderShape:
    window = getattr(config, "sliding_window", None)
    return replace(shape, renormalise=True, windows=(window,) * shape.num_layers)


def _qwen_layers(config: Any, shape: DecoderShape) -> tuple[bool, ...]:
    dense = config.mlp_only_layers or []
    return tuple(
        layer not in dense and (layer + 1) % config.decoder_sparse_step == 0 for layer in range(shape.num_layers)
    )


def _qwen2_moe(config: Any, shape: DecoderShape) -> DecoderShape:
    slide = [kind == "sliding_attention" for kind in config.layer_types]
    return replace(
        shape,
        expert_width=config.moe_intermediate_size,
        moe_layers=_qwen_layers(config, shape),
        windows=tuple(config.sliding_window if sliding else None for sliding in slide),
        qkv_bias=config.qkv_bias,
        shared_width=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


def _qwen3_moe(config: Any, shape: DecoderShape) -> DecoderShape:
    return replace(
        shape,
        expert_width=config.moe_intermediate_size,
        moe_layers=_qwen_layers(config, shape),
        qk_norm="head",
        windows=(config.sliding_window,) * shape.num_layers,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )


def _olmoe(config: Any, shape: DecoderShape) -> DecoderShape:
    if config.clip_qkv is not None:
        raise NotNativeError(f"olmoe with clip_qkv {config.clip_qkv}: the native decoder expects none")
    bias = config.attention_bias
    return replace(shape, qk_norm="projection", qkv_bias=bias, output_bias=bias)


def _gpt_oss(config: Any, shape: DecoderShape) -> DecoderShape:
    alpha, limit = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
    if (alpha, limit) != (1.702, 7.0):
        found = f"swiglu_alpha {alpha} and swiglu_limit {limit}"
        raise NotNativeError(f"gpt_oss with {found}: the native decoder expects 1.702 and 7")
    slide = [kind == "sliding_attention" for kind in config.layer_types]
    return replace(
        shape,
        renormalise=True,  # its softmax runs over the chosen logits alone, which is the same
        activation="gpt_oss",
        windows=tuple(config.sliding_window if sliding else None for sliding in slide),
        sinks=True,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        moe_bias=True,
    )


def _deepseek(config: Any, shape: DecoderShape) -> DecoderShape:
    latent = deepseek.latent_shape(config)
    return replace(
        shape,
        head_size=latent.query,
        expert_width=config.moe_intermediate_size,
        moe_layers=tuple(layer >= config.first_k_dense_replace for layer in range(shape.num_layers)),
        shared_width=config.moe_intermediate_size * (config.n_shared_experts or 0),
        latent=latent,
        routing=deepseek.routing(config),
    )


_READERS = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
