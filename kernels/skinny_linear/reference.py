"""Plain-torch reference of a linear layer for few tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import linear


def skinny_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What `skinny_linear` computes, on any device; the same arguments and results."""
    return linear(x.float(), weight.float(), None if bias is None else bias.float()).to(dtype or x.dtype)
