"""Plain-torch reference of residual addition and RMSNorm.

Shape legend: T tokens, D width.
"""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale the last dimension to a root mean square of 1, then by the weight, in float32.

    Args:
        x: float ``[…, D]``.
        weight: float ``[D]``.
        eps: added to the mean square.

    Returns:
        float32, the shape of ``x``.
    """
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_rms_norm` computes, on any device; the same arguments and results."""
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    return total, rms_norm(total, weight, eps).to(x.dtype)
