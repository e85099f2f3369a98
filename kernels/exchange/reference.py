"""Plain-torch reference of the exchange, from the tensors of all ranks.

Shape legend: T rows of a rank, K choices per row, G ranks, D model width.
"""

from __future__ import annotations

import torch

from kernels.rms_norm.reference import rms_norm
from kernels.route import Routes


def sum_parts(parts: torch.Tensor) -> torch.Tensor:
    """Sum ``[G, …]`` in the order of the ranks, float32."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total


def weighted_part(pairs: torch.Tensor, routes: Routes) -> torch.Tensor:
    """A rank's share of its tokens' routed output: pairs ``[T·K, D]`` with a slot here, by weight; ``[T, D]``."""
    tokens, top_k = routes.slots.shape
    rows = pairs.float().view(tokens, top_k, pairs.shape[1]).masked_fill((routes.slots < 0)[:, :, None], 0.0)
    total = torch.zeros_like(rows[:, 0])
    for choice in range(top_k):
        total += routes.weights[:, choice, None] * rows[:, choice]
    return total.to(pairs.dtype)


def finish(
    total: torch.Tensor, shared: torch.Tensor | None, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the shared experts' output and the residual to a float32 sum ``[T, D]``, round it, and normalise."""
    if shared is not None:
        total = total + shared.float()
    stored = (total + residual.float()).to(residual.dtype)
    return stored, rms_norm(stored, norm_weight, eps).to(residual.dtype)


def rows_served(gpus: torch.Tensor, rank: int) -> torch.Tensor:
    """Which rows of ``[…, K]`` have a pair that a rank serves, bool ``[…]``."""
    return (gpus == rank).any(dim=-1)
