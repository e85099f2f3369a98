"""Choosing the next tokens from logits, repeatably per request."""

from __future__ import annotations

import torch

from runtime.requests import SamplingParameters


class Sampler:
    """Draws one request's tokens.

    Args:
        sampling: how; its seed, a number here, makes the draws independent of what else is in the batch.
    """

    def __init__(self, sampling: SamplingParameters) -> None:
        assert sampling.seed is not None
        self.temperature, self.top_p = sampling.temperature, sampling.top_p
        self._generator = torch.Generator().manual_seed(sampling.seed)

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
