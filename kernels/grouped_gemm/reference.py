"""Plain-torch reference of the experts' two matrix products, computed in float32.

Shape legend: T tokens, K choices per token, P local slots, D model width, F expert width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch.nn.functional import silu

from kernels.permute import Permutation

Activation = Literal["silu", "gpt_oss"]
GPT_OSS_ALPHA, GPT_OSS_LIMIT = 1.702, 7.0


def activate(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The gated activation: SiLU, or the clamped one of gpt-oss."""
    if activation == "silu":
        return silu(gate) * up
    gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
    return (up + 1) * gate * torch.sigmoid(GPT_OSS_ALPHA * gate)


def gate_up_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    permutation: Permutation,
    top_k: int,
    activation: Activation = "silu",
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `gate_up` computes, on any device; rows of pairs without a slot here are NaN."""
    hidden = x.new_full((len(permutation.order), weight.shape[1] // 2), torch.nan)
    for slot, pairs in _slots_with_pairs(permutation):
        both = x[pairs // top_k].float() @ weight[slot].float().T
        if bias is not None:
            both += bias[slot].float()
        gate, up = both.chunk(2, dim=1)
        hidden[pairs] = activate(gate, up, activation).to(x.dtype)
    return hidden


def down_reference(
    hidden: torch.Tensor, weight: torch.Tensor, permutation: Permutation, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """What `down` computes, on any device; rows of pairs without a slot here are NaN."""
    out = hidden.new_full((len(hidden), weight.shape[1]), torch.nan)
    for slot, pairs in _slots_with_pairs(permutation):
        rows = hidden[pairs].float() @ weight[slot].float().T
        out[pairs] = (rows if bias is None else rows + bias[slot].float()).to(hidden.dtype)
    return out


def _slots_with_pairs(permutation: Permutation) -> Iterator[tuple[int, torch.Tensor]]:
    """Every slot that has pairs, and their indices."""
    bounds = permutation.indptr.tolist()
    for slot, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end > start:
            yield slot, permutation.order[start:end].long()
