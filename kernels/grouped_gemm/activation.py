"""Triton function of the experts' gated activations, shared by the kernels of the first product."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.grouped_gemm.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT

ALPHA = tl.constexpr(GPT_OSS_ALPHA)
LIMIT, LEAST = tl.constexpr(GPT_OSS_LIMIT), tl.constexpr(-GPT_OSS_LIMIT)


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """``silu``, ``gpt_oss`` or, where there is no up projection, ``none`` of float32 sums."""
    if ACTIVATION == "silu":
        gate = gate / (1 + tl.exp(-gate)) * up
    if ACTIVATION == "gpt_oss":
        gate = tl.where(gate > LIMIT, LIMIT, gate)  # NaN stays, as a minimum would not let it
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < LEAST, LEAST, up))
        gate = (up + 1) * gate / (1 + tl.exp(-(gate * ALPHA)))
    return gate
