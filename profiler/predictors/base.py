"""The interface of all predictors: what they learn from, what they may look at, and what they answer.

A predictor tells one layer's experts. It is learned from a sample of routes, and then asked for a batch of tokens with
what is known of them before that layer's router has run.

Shape suffixes: T tokens, H layers of history, L layers, K choices, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

#: How much more a choice counts than the next one. Experts that were chosen equally often then rank in the order of the
#: router's weights; a power of two, so that sums are exact whatever their order.
RANK_STEP = 2.0**-16


@dataclass(frozen=True)
class Context:
    """What is known of a batch of tokens before the router of the predicted layer has run.

    Attributes:
        experts: ids ``[T, H, K]`` of the H MoE layers before it, the nearest last; H may be 0, or less than a predictor
            could use.
        token_ids: ``[T]``, or None.
        gate_ahead: ids ``[T, K]`` that its router chooses from the gate input of the layer before, or None.
    """

    experts: np.ndarray
    token_ids: np.ndarray | None = None
    gate_ahead: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """What a predictor expects of a batch of tokens.

    Attributes:
        scores: float32 ``[T, E]``, each expert's estimated probability of being among the K chosen (a little more for
            experts that come first: ``choice_weights``). Their sum over the tokens estimates the layer's popularity.
        seen: bool ``[T]``, False where the token's whole context had never been seen and less of it, or popularity,
            had to do.
    """

    scores: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class RouteSample:
    """Routes to learn from or to judge on, in memory.

    Attributes:
        experts: uint8 or uint16 ``[T, L, K]``.
        num_experts: E.
        token_ids: int32 ``[T]``, or None.
        gate_ahead: uint8 or uint16 ``[T, L-1, K]``, entry ``[t, l]`` foretells layer l + 1; or None.
    """

    experts: np.ndarray
    num_experts: int
    token_ids: np.ndarray | None = None
    gate_ahead: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.experts)

    def chosen(self, layer: int) -> np.ndarray:
        """Experts of one layer, ``[T, K]``."""
        return self.experts[:, layer]

    def context(self, layer: int) -> Context:
        """What is known before a layer's router runs: nothing of that layer or of those after it."""
        ahead = None if self.gate_ahead is None or layer == 0 else self.gate_ahead[:, layer - 1]
        return Context(self.experts[:, :layer], self.token_ids, ahead)


class Predictor(ABC):
    """Tells the experts of one layer.

    Attributes:
        name: such as ``path-3``.
        description: what it predicts from, in a few words.
        paper: what the paper that the idea is from reports, in a few words, or None.
    """

    name: str
    description: str
    paper: str | None = None

    @abstractmethod
    def estimate(self, context: Context) -> Estimate:
        """Expect experts for a batch of tokens, each token by itself."""


def choice_weights(top_k: int) -> np.ndarray:
    """What a token's choices count: 1 for the last and ``RANK_STEP`` more for each before it, float64 ``[K]``."""
    return 1 + RANK_STEP * np.arange(top_k - 1, -1, -1)
