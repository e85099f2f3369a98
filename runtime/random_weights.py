"""Models with random weights from a configuration alone, the same for every plan and number of ranks.

Used to measure shapes whose checkpoints are not at hand. Every tensor is drawn from a generator seeded by its name,
and by its expert's logical id, so that a rank makes only its own experts and all plans describe one model.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

from profiler.seam import find_moe_layers
from runtime.checkpoint import LoadReport, Slots
from runtime.errors import ModelError, first_line
from runtime.experts import expert_parameter_names, shrink_to_slots

STANDARD_DEVIATION = 0.02


def random_shard(
    path: str, slots: Slots, dtype: torch.dtype | str, device: torch.device, seed: int = 0
) -> tuple[Any, LoadReport]:
    """Build this rank's part of a random model from ``config.json`` alone.

    Args:
        path: directory with a ``config.json``, or a hub id.
        slots: for every MoE layer (decoder layer number) the logical ids this rank holds, in slot order.
        dtype: of the parameters; ``"auto"`` means the configuration's, else bfloat16.
        device: where the weights are made.
        seed: of the whole model.

    Returns:
        The model in evaluation mode, and its MoE layers.

    Raises:
        ModelError: there is no usable configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path}: no usable config.json ({first_line(error)})") from error
    resolved = getattr(config, "dtype", None) or torch.bfloat16 if dtype == "auto" else dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=resolved)
    layers = find_moe_layers(model)
    stacked = {f"{layer.name}.{name}": layer for layer in layers for name in expert_parameter_names(layer)}
    for layer in layers:
        shrink_to_slots(layer, len(slots[layer.layer_id]))
        # Left out of the family's initialisation: its draws for everything else are then the same on every rank.
        layer.experts._is_hf_initialized = True  # type: ignore[assignment]
    model.to_empty(device=device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.init_weights()  # buffers, norms and biases as the family has them
    model.tie_weights()
    generator = torch.Generator(device=device)
    for name, parameter in model.named_parameters():
        if name in stacked:
            for slot, expert in enumerate(slots[stacked[name].layer_id]):
                _fill(parameter.data[slot], f"{name}.{expert}", generator, seed)
        elif parameter.ndim >= 2:
            _fill(parameter.data, name, generator, seed)
    return model.eval().requires_grad_(False), LoadReport(layers=layers)


def _fill(tensor: torch.Tensor, name: str, generator: torch.Generator, seed: int) -> None:
    generator.manual_seed((zlib.crc32(name.encode()) << 16) + seed)
    tensor.normal_(0, STANDARD_DEVIATION, generator=generator)
