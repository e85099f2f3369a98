"""The demo model itself: its settings, a small Qwen3-MoE, its losses, and how it is built and saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


@dataclass(frozen=True)
class Settings:
    """What defines a run; stored beside the checkpoint, and a resumed run must have the same."""

    seed: int = 0
    layers: int = 8
    experts: int = 16
    hidden: int = 256
    expert_hidden: int = 96
    vocabulary: int = 8192
    context: int = 2048
    sequences: int = 32
    learning_rate: float = 2e-3
    balance: float = 0.01
    # Domains are drawn with probability proportional to tokens ** temperature: between equal and proportional shares.
    temperature: float = 0.35
    tokenizer_bytes: int = 3_000_000
    max_documents: int | None = None


def model_config(settings: Settings, tokenizer: Any) -> Qwen3MoeConfig:
    """Qwen3-MoE in small: all layers MoE, top-2, grouped-query attention, tied embeddings."""
    return Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        moe_intermediate_size=settings.expert_hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 32,
        num_key_value_heads=settings.hidden // 64,
        head_dim=32,
        num_experts=settings.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=settings.balance,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(settings: Settings, tokenizer: Any, device: torch.device) -> Any:
    """Model on ``device``: bf16 parameters on a GPU, float32 on a CPU, whose bf16 matrix products are slow.

    Buffers stay float32: a rotary table in bf16 would be wrong at far positions.
    """
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM._from_config(model_config(settings, tokenizer), dtype=torch.float32)
    model.set_experts_implementation("eager")
    if device.type == "cuda":
        parameters_to_bf16(model)
    return model.to(device).train()


def use_grouped_experts(model: Any, tokens: torch.Tensor) -> None:
    """Switch the experts to grouped matrix products where their gradients agree with the plain loop's.

    The loop over experts is the reference; where the grouped product of this PyTorch gives other gradients, it stays.
    """
    gradients = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        losses(model, tokens)[0].backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
        model.zero_grad(set_to_none=True)
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    kept = "grouped_mm" if error < 0.1 else "eager"
    model.set_experts_implementation(kept)
    print(f"experts: {kept} (gradients of grouped_mm differ by {error:.4f} from the loop's)", flush=True)


def parameters_to_bf16(model: Any) -> None:
    """Convert the parameters, not the buffers, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def losses(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats, load-balancing loss, and experts' loads (choices per token, float ``[layers, experts]``).

    The balancing loss is the architecture's, taken layer by layer over the whole batch: summed over layers first, an
    expert that is idle in one layer would be excused by being busy in another.
    """
    output = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    entropy = functional.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    config = model.config
    balance = torch.stack(
        [
            load_balancing_loss_func((logits.float(),), config.num_experts, config.num_experts_per_tok)
            for logits in output.router_logits
        ]
    ).mean()
    with torch.no_grad():
        choices = torch.stack(
            [logits.topk(config.num_experts_per_tok).indices.flatten() for logits in output.router_logits]
        )
        loads = functional.one_hot(choices, config.num_experts).float().mean(1) * config.num_experts_per_tok
    return entropy, balance, loads


def save_model(model: Any, tokenizer: Any, output: Path) -> None:
    """Hugging Face folder with bf16 shards of at most 10 MB; leftovers of an earlier model are removed."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.safetensors*"):
        old.unlink()
    parameters_to_bf16(model)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.9,
        top_p=0.95,
    )
    model.save_pretrained(output, max_shard_size="10MB")
    tokenizer.save_pretrained(output)
