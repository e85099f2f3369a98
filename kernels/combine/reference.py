"""Plain-torch reference of the combination.

Shape legend: T tokens, K choices per token, D model width.
"""

from __future__ import annotations

import torch

from kernels.route import Routes


def combine_reference(
    pairs: torch.Tensor,
    routes: Routes,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `combine` computes, on any device; the same arguments and results."""
    tokens, top_k = routes.slots.shape
    rows = pairs.float().view(tokens, top_k, pairs.shape[1])
    rows = rows.masked_fill((routes.slots < 0)[:, :, None], 0.0)
    total = torch.zeros_like(residual, dtype=torch.float32)
    for choice in range(top_k):
        total += routes.weights[:, choice, None] * rows[:, choice]
    if shared is not None:
        total += shared.float()
    stored = (total + residual.float()).to(residual.dtype)
    wide = stored.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + eps) * norm_weight.float()
    return stored, normed.to(residual.dtype)
