"""What DeepSeek's families add to the decoder: latent attention and their routers, read from the configuration.

Shape legend: H heads, C latent size, n plain and r rotated entries of a head's query, v of its value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

LATENT_SIZES = (16, 32, 64, 128, 256, 512)
ROTATED_SIZES = (16, 32, 64, 128)
NORM_EPS = 1e-6  # of the norms of latent vectors, which take it from no configuration


@dataclass(frozen=True)
class LatentShape:
    """Attention whose keys and values are projections of one latent vector per token, which alone is cached.

    Attributes:
        size: C.
        query_size: of the latent vector that queries are projected from; None where they come from hidden states.
        plain: n.
        rotated: r, also of the key that all heads share.
        value_size: v.
        scale: factor of the scores.
        interleaved: whether the pairs (2 i, 2 i + 1) are rotated rather than (i, i + r / 2).

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.
    """

    size: int
    query_size: int | None
    plain: int
    rotated: int
    value_size: int
    scale: float
    interleaved: bool

    @property
    def query(self) -> int:
        """Entries of a head's query."""
        return self.plain + self.rotated

    @property
    def entry(self) -> int:
        """Numbers cached for one token in one layer."""
        return self.size + self.rotated


@dataclass(frozen=True)
class Routing:
    """How a router chooses, apart from K and renormalising, as `kernels.route` names it.

    Attributes:
        scoring: what turns logits into scores.
        scale: factor of the weights.
        num_groups: of neighbouring experts.
        top_groups: only so many may be chosen from.
        group_score: what a group counts.
        corrected: whether a bias per expert takes part in the choice.
        float32: whether logits are float32 rather than of the dtype of the weights.
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    corrected: bool = False
    float32: bool = False


def latent_shape(config: Any) -> LatentShape:
    """The attention of a DeepSeek-V2 or DeepSeek-V3 configuration."""
    plain, rotated = config.qk_nope_head_dim, config.qk_rope_head_dim
    return LatentShape(
        size=config.kv_lora_rank,
        query_size=config.q_lora_rank,
        plain=plain,
        rotated=rotated,
        value_size=config.v_head_dim,
        scale=(plain + rotated) ** -0.5 * _longer_context(config.rope_parameters) ** 2,
        interleaved=bool(getattr(config, "rope_interleave", True)),
    )


def _longer_context(rope: dict[str, Any]) -> float:
    """What queries and keys are multiplied by where the rotary embedding is stretched."""
    emphasis, factor = rope.get("mscale_all_dim"), rope.get("factor") or 1.0
    if rope["rope_type"] == "default" or not emphasis or factor <= 1:
        return 1.0
    return 0.1 * float(emphasis) * math.log(factor) + 1.0


def routing(config: Any) -> Routing:
    """The routers of a DeepSeek-V2 or DeepSeek-V3 configuration."""
    scale = float(config.routed_scaling_factor)
    if config.model_type == "deepseek_v3":
        return Routing("sigmoid", scale, config.n_group, config.topk_group, "top2_sum", corrected=True, float32=True)
    if config.topk_method == "greedy":
        return Routing("softmax", scale, float32=True)
    return Routing("softmax", scale, config.n_group, config.topk_group, float32=True)


def limits(config: Any) -> list[tuple[str, object, bool, str]]:
    """What a configuration asks for beyond `LatentShape` and `Routing`: name, value, whether it fits, what fits."""
    third = config.model_type == "deepseek_v3"
    methods = (None, "noaux_tc") if third else ("greedy", "group_limited_greedy")
    rows = [
        ("kv_lora_rank", config.kv_lora_rank, LATENT_SIZES),
        ("qk_rope_head_dim", config.qk_rope_head_dim, ROTATED_SIZES),
        ("attention_bias", config.attention_bias, (False,)),
        ("mlp_bias", getattr(config, "mlp_bias", False), (False,)),
        ("moe_layer_freq", getattr(config, "moe_layer_freq", 1), (1,)),
        ("topk_method", getattr(config, "topk_method", None), methods),
        ("scoring_func", getattr(config, "scoring_func", None), (None, "sigmoid" if third else "softmax")),
        ("norm_topk_prob", config.norm_topk_prob, (True, False) if third else (False,)),
    ]
    return [
        (name, value, value in fitting, " or ".join(str(one) for one in fitting if one is not None))
        for name, value, fitting in rows
    ]
