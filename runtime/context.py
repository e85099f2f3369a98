"""What a forward pass tells the sharded experts of every layer about its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Routes = tuple[torch.Tensor, torch.Tensor]


@dataclass
class StepContext:
    """Shared by all layers of one rank; the worker fills it in before each forward pass.

    Attributes:
        valid: which of this rank's flattened positions ``[batch · length]`` hold real tokens; None means all.
            Padding is neither dispatched nor computed.
        tokens_per_rank: real tokens of every rank in this pass, known to all ranks from the step's plan.
        forced_routes: for tests and benchmarks: called with the layer index, this rank's routes ``[T, K]`` (ids and
            weights of real tokens) are replaced by what it returns.
        on_routes: called with the layer index and this rank's final routes, before dispatch.
        kept_routes: where it is a list, every MoE layer adds the routes of all ranks' tokens, rank after rank.
        row_values: width of the hidden states that the experts take.
        row_bytes: of one such hidden state.
    """

    valid: torch.Tensor | None = None
    tokens_per_rank: list[int] = field(default_factory=list)
    forced_routes: Callable[[int, Routes], Routes] | None = None
    on_routes: Callable[[int, Routes], None] | None = None
    kept_routes: list[Routes] | None = None
    row_values: int = 0
    row_bytes: int = 0

    def keep(self, routes: Routes) -> None:
        """Add a layer's routes of all ranks' tokens, if they are kept."""
        if self.kept_routes is not None:
            self.kept_routes.append(routes)
