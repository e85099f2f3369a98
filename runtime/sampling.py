"""Choosing the next tokens from logits, repeatably per request."""

from __future__ import annotations

import torch


class Sampler:
    """Draws one request's tokens.

    Args:
        temperature: divisor of the logits; 0 means greedy, which needs no draw.
        top_p: probability mass of the nucleus that is sampled from, in (0, 1].
        seed: of this request's draws, which do not depend on what else is in the batch.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Draw a token id from float32 logits ``[vocabulary]``; the temperature must be above 0."""
        logits = logits.double().cpu()
        # The greatest logit becomes 0 first, so that the division stays finite for the smallest temperatures.
        probabilities = torch.softmax((logits - logits.max()) / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            outside = ordered.cumsum(0) - ordered >= self.top_p  # the token that crosses the mass stays
            probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(outside, 0))
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
