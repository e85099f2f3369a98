"""The seam between a model's routers and its experts, where routes are recorded and experts are replaced.

Transformers calls the experts of every MoE block as ``experts(hidden_states [T, D], top_k_index [T, K],
top_k_weights [T, K])``, by position and with tokens flattened; its ``ExpertsInterface`` replaces the implementation
behind that call. Taking the indices there means taking what the router decided, with its biases, groups and scaling,
whatever the family.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass

from torch import nn

from profiler.errors import ModelError

# Names the families use for the call's second and third argument. (Switch Transformers and NLLB pass masks instead.)
SEAM_PARAMETERS = (("top_k_index", "top_k_weights"), ("router_indices", "routing_weights"))
TOP_K_SETTINGS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "top_k")
NUM_EXPERTS_ATTRIBUTES = ("total_experts", "num_experts")  # total_experts counts identity experts as well


@dataclass(frozen=True)
class MoELayer:
    """The routed experts of one decoder layer.

    Attributes:
        layer_id: index of the decoder layer.
        name: path of the experts module in the model.
        experts: the module that is called with hidden states, indices and weights.
        num_experts: logical experts (E).
        top_k: experts per token (K).
    """

    layer_id: int
    name: str
    experts: nn.Module
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's weights, in the data type they are held in."""
        return sum(weight.numel() * weight.element_size() for weight in self.experts.parameters()) // self.num_experts


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find the experts that a model routes tokens to; works on meta tensors as well.

    Args:
        model: any Transformers model.

    Returns:
        One entry per MoE layer, by rising decoder layer.

    Raises:
        ModelError: the model has none, or two in one decoder layer.
    """
    layers = [
        MoELayer(_layer_id(name), name, module, _num_experts(name, module), _find_top_k(model, name))
        for name, module in model.named_modules()
        if routes_tokens(module)
    ]
    layers.sort(key=lambda layer: layer.layer_id)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no MoE layer whose experts are called with the router's choices; give an MoE "
            "model that routes through Transformers' ExpertsInterface"
        )
    for before, after in itertools.pairwise(layers):
        if before.layer_id == after.layer_id:
            raise ModelError(
                f"{type(model).__name__} has two sets of routed experts in decoder layer {after.layer_id} "
                f"({before.name}, {after.name}), expected one; it cannot be recorded"
            )
    return layers


def routes_tokens(module: nn.Module) -> bool:
    """Whether a module is called with the experts chosen for each token, and their weights."""
    # functools.wraps of the ExpertsInterface decorator keeps the original signature.
    parameters = tuple(inspect.signature(type(module).forward).parameters)
    return parameters[2:4] in SEAM_PARAMETERS


def _layer_id(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ModelError(f"experts at {name!r} stand in no numbered decoder layer; the model cannot be recorded")
    return numbers[0]


def _num_experts(name: str, experts: nn.Module) -> int:
    for attribute in NUM_EXPERTS_ATTRIBUTES:
        value = getattr(experts, attribute, None)
        if isinstance(value, int):
            return value
    raise ModelError(f"experts at {name!r} do not say how many they are; the model cannot be recorded")


def _find_top_k(model: nn.Module, name: str) -> int:
    """From the router beside the experts, from the block around them, or from the configuration."""
    block = model.get_submodule(name.rpartition(".")[0])
    candidates: list[tuple[object, str]] = [(module, "top_k") for module in (*block.children(), block)]
    config = getattr(model, "config", None)
    for settings in (config, getattr(config, "text_config", None), getattr(config, "ffn_config", None)):
        candidates += [(settings, setting) for setting in TOP_K_SETTINGS]
    for holder, attribute in candidates:
        value = getattr(holder, attribute, None)
        if isinstance(value, int):
            return value
    raise ModelError(f"nothing beside the experts at {name!r} says how many each token goes to; it cannot be recorded")
