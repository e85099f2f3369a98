"""Tiny random-weight MoE models of many families, float32, built from their configuration alone.

Routers are initialised wide, and biases and correction terms away from zero, so that routing is diverse, every term
of it matters, and near-ties are unlikely.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 128
MAX_POSITIONS = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 8}
_MLA |= {"num_key_value_heads": 4}
_GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "moe_intermediate_size": 24}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_QWEN = {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "shared_expert_intermediate_size": 24}

# Per family: the model type, if it is not the name, and what differs from _COMMON. Where a family has leading dense
# layers, the first layer here is one.
_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {
        **_MLA,
        **_GROUPED,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "topk_group": 1,  # with as many as choices the limit never binds
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v2_lite": {
        **_MLA,
        **_GROUPED,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.8,
            "mscale_all_dim": 0.5,
        },
    },
    "deepseek_v3": {**_MLA, **_GROUPED, "first_k_dense_replace": 1, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 2},
    "phimoe": {"num_local_experts": 8},
    "granitemoe": {"num_local_experts": 8},
    "glm4_moe": {**_GROUPED, "first_k_dense_replace": 1, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_experts_per_tok": None,
    },
    "minimax": {"num_local_experts": 8, "block_size": 8, "head_dim": 8},
    "jamba": {
        "num_experts": 4,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "qwen3_next": {
        **_QWEN,
        **_LINEAR,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "qwen3_5_moe": {
        **_QWEN,
        **_LINEAR,
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "head_dim": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": MAX_POSITIONS,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "num_dense_layers": 1,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "exaone_moe": {**_GROUPED, "num_experts": 8, "num_shared_experts": 1, "head_dim": 8, "first_k_dense_replace": 1},
    "flex_olmo": {"num_experts": 8},
    "dots1": {**_GROUPED, "head_dim": 8, "first_k_dense_replace": 1},
}
VARIANTS = ("deepseek_v2_lite",)  # of a family that is there already
FAMILIES = tuple(name for name in _FAMILIES if name not in VARIANTS)


def tiny_config(family: str) -> Any:
    """The configuration of a family's tiny model."""
    settings = _COMMON | _FAMILIES[family]
    model_type = settings.pop("model_type", family)
    if family == "dbrx":  # its own names for these; the shared ones are read-only aliases
        aliases = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
        unknown = ("intermediate_size", "num_key_value_heads", "num_experts_per_tok")
        settings = {key: value for key, value in settings.items() if key not in (*aliases, *unknown)}
    unset = {"q_lora_rank"}  # where None says something; elsewhere it takes a shared setting back
    kept = {key: value for key, value in settings.items() if value is not None or key in unset}
    return AutoConfig.for_model(model_type, **kept)


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a family's tiny model in evaluation mode; the same seed gives the same weights.

    Args:
        family: one of ``FAMILIES`` or ``VARIANTS``.
        seed: of the weights.

    Returns:
        A float32 causal language model on the CPU: vocabulary 128, width 32, 2 to 4 layers, 4 or 8 experts, top-2.
    """
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
        _randomise(model)
    finally:
        torch.set_rng_state(generator_state)
    return model


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        parts = name.split(".")
        is_router = any(part in ("gate", "router") for part in parts) and "shared_experts" not in parts
        if name.endswith(("e_score_correction_bias", "expert_bias", "moe_statics.e_score_correction_bias")):
            tensor.normal_(std=0.1)
        elif name not in dict(model.named_parameters()) or parts[-1] in ("A_log", "D", "dt_bias"):
            continue  # other buffers and the constants of recurrent layers keep their initial values
        elif is_router and tensor.ndim == 2:
            tensor.normal_(std=0.5)
        elif tensor.ndim >= 2:
            tensor.normal_(std=0.15)
        elif parts[-1] == "weight":
            tensor.add_(torch.randn_like(tensor) * 0.1)  # norms stay around their initial value
        else:
            tensor.normal_(std=0.1)
