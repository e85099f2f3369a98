"""Plain-torch reference of a matrix for every head."""

from __future__ import annotations

import torch


def head_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `head_linear` computes, on any device; the same arguments and results."""
    product = torch.bmm(x.float().transpose(0, 1), weight.float())
    return product.transpose(0, 1).contiguous().to(x.dtype)
