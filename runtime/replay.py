"""Routes that are given instead of chosen, so that random weights can be measured with real routing.

Only `bench` can switch this on. The router still runs, and its weights are kept, largest first; its choice of experts
is replaced, step by step.

Shape legend: S steps, L MoE layers, T sequences decoded on a rank, K choices per token, E logical experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from profiler.errors import InputError
from profiler.trace_format import RoutingTrace


@dataclass(frozen=True)
class RouteSource:
    """Where replayed routes come from.

    Attributes:
        name: ``uniform``, or the path of a routing trace: its odd sequences, which no plan was solved on, are replayed.
        num_experts: E of the model.
        top_k: K of the model.
        num_layers: L of the model.
        seed: of every draw.
    """

    name: str
    num_experts: int
    top_k: int
    num_layers: int
    seed: int

    def draw(self, num_steps: int, num_tokens: int, rank: int = 0) -> torch.Tensor:
        """Routes of so many steps of so many sequences.

        Returns:
            Logical ids, int32 ``[S, L, T, K]``, distinct within each choice.
        """
        rng = np.random.default_rng((self.seed, num_tokens, rank))
        if self.name == "uniform":
            routes = self._uniform(rng, num_steps, num_tokens)
        else:
            routes = self._replay(rng, num_steps, num_tokens)
        return torch.from_numpy(np.ascontiguousarray(routes.astype(np.int32)))

    def _uniform(self, rng: np.random.Generator, num_steps: int, num_tokens: int) -> np.ndarray:
        """Floyd's way to draw K of E without repetition, for all tokens at once."""
        shape = (num_steps, self.num_layers, num_tokens)
        chosen = np.empty((*shape, self.top_k), dtype=np.int32)
        for place, last in enumerate(range(self.num_experts - self.top_k, self.num_experts)):
            drawn = rng.integers(last + 1, size=shape, dtype=np.int32)
            taken = (chosen[..., :place] == drawn[..., None]).any(axis=-1)
            chosen[..., place] = np.where(taken, last, drawn)
        return chosen

    def _replay(self, rng: np.random.Generator, num_steps: int, num_tokens: int) -> np.ndarray:
        """Every row follows unseen sequences through their generated tokens, one after the other."""
        with RoutingTrace.open(self.name) as trace:
            sequence = trace.sequence()
            tokens = _replayed_tokens(trace)
            starts = np.flatnonzero(np.diff(sequence[tokens], prepend=-1))
            first = rng.choice(starts, num_tokens)  # each row begins at the beginning of a sequence
            rows = tokens[(first[None, :] + np.arange(num_steps)[:, None]) % len(tokens)]  # [S, T]
            shape = (num_steps, num_tokens, self.num_layers, self.top_k)
            return np.asarray(trace.experts()[rows.ravel()]).reshape(shape).swapaxes(1, 2)


def route_source(name: str, num_experts: int, top_k: int, num_layers: int, seed: int) -> RouteSource | None:
    """The source that the setting ``routes`` names; None for ``model``, which routes as usual.

    Raises:
        InputError: it names neither ``model`` nor ``uniform`` nor a file, or a trace that is not of this model's shape
            or without generated tokens.
    """
    if name == "model":
        return None
    if name != "uniform" and not Path(name).is_file():
        raise InputError(f"routes={name}: expected model, uniform, or a routing trace from `python -m profiler trace`")
    if name != "uniform":
        with RoutingTrace.open(name) as trace:
            found = (trace.num_experts, trace.top_k, trace.num_layers)
            if found != (num_experts, top_k, num_layers):
                expected = f"{num_experts} experts, {top_k} choices and {num_layers} MoE layers"
                raise InputError(
                    f"routes={name}: {found[0]} experts, {found[1]} choices and {found[2]} MoE layers, expected "
                    f"{expected}; give a trace of this model, or routes=uniform"
                )
            if not len(_replayed_tokens(trace)):
                raise InputError(f"routes={name}: no odd sequence has generated tokens; record longer answers")
    return RouteSource(name, num_experts, top_k, num_layers, seed)


def _replayed_tokens(trace: RoutingTrace) -> np.ndarray:
    """Indices of the tokens that odd sequences generated."""
    return np.flatnonzero((trace.sequence() % 2 == 1) & (trace.decode() == 1))


def active_experts(routes: torch.Tensor) -> float:
    """Distinct experts per layer and step of routes ``[S, L, T, K]``, on average."""
    steps, layers = routes.shape[:2]
    active = torch.zeros((steps, layers, int(routes.max()) + 1))
    active.scatter_(2, routes.flatten(2).long(), 1)
    return float(active.sum(dim=2).mean())
