"""Cosines and sines of the rotary embedding for every position, with the scaling that the configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from runtime.native.families import DecoderShape


def rotary_table(config: Any, shape: DecoderShape, num_positions: int, device: torch.device) -> torch.Tensor:
    """Cosine and sine by position, as `kernels.rope_cache` takes them.

    Args:
        config: the Transformers configuration, whose ``rope_parameters`` name base and scaling.
        shape: of the decoder, checked by `read_shape`.
        num_positions: S, the first of which the table has.
        device: of the table.

    Returns:
        float32 ``[S, 2, r/2]`` for r rotated entries of a head, multiplied by the scaling's attention factor.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, shape.rotated, 2, dtype=torch.float32) / shape.rotated
        frequencies, factor = 1.0 / (rope["rope_theta"] ** exponents), 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies.float()
    return (torch.stack([angles.cos(), angles.sin()], dim=1) * factor).to(device)
