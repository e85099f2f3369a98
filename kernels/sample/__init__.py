"""Choosing the next token of every sequence from its logits.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch

from kernels.sample.reference import sample_reference

__all__ = ["sample", "sample_reference"]


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    top_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token per row, repeatably: the same logits, settings, seed and position always give the same token.

    Every token's logit, divided by the temperature, gets Gumbel noise that is a function of (seed, position, token)
    alone, and the greatest sum within the nucleus wins; so a draw depends neither on the row nor on its neighbours.

    Args:
        logits: bfloat16, float16 or float32 ``[B, V]``, rows contiguous.
        temperature: float32 ``[B]``; 0 takes the greatest logit, the lowest id of equal ones. Others count as 1e-5 at
            least.
        seeds: of each request's draws, int64 ``[B]``.
        positions: of the token to draw in its sequence, integer ``[B]``, so that one seed serves all steps.
        top_p: probability mass of the nucleus that is drawn from, float32 ``[B]`` in (0, 1]: the most likely tokens
            (lower ids first among equals) up to the one with which their sum reaches it; None for 1.

    Returns:
        Token ids, int64 ``[B]``.

    Source: the Gumbel-max trick; noise from hashed counters instead of a generator's state.
    """
    if logits.is_cuda:
        from kernels.sample.kernel import sample_triton

        return sample_triton(logits, temperature, seeds, positions, top_p)
    return sample_reference(logits, temperature, seeds, positions, top_p)
