"""Small routing traces with random, valid content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiler.trace_format import TraceWriter


@dataclass(frozen=True)
class RandomSequence:
    """One sequence: experts and weights ``[T, L, K]``, decode and token_ids ``[T]``, gate_ahead ``[T, L - 1, K]``."""

    experts: np.ndarray
    weights: np.ndarray
    decode: np.ndarray
    token_ids: np.ndarray
    gate_ahead: np.ndarray


def random_sequences(
    lengths: Sequence[int], *, num_layers: int = 3, num_experts: int = 8, top_k: int = 2, seed: int = 0
) -> list[RandomSequence]:
    """Sequences of the given lengths with uneven, layer-dependent popularity and falling weights."""
    generator, ahead_generator = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    preference = generator.gumbel(size=(num_layers, num_experts))
    sequences = []
    for length in lengths:
        scores = preference + generator.gumbel(size=(length, num_layers, num_experts))
        experts = np.argsort(-scores, axis=-1)[..., :top_k]
        weights = -np.sort(-generator.random((length, num_layers, top_k)), axis=-1).astype(np.float16)
        decode = np.arange(length) >= length // 2
        token_ids = generator.integers(0, 1000, length)
        ahead = np.argsort(ahead_generator.random((length, num_layers - 1, num_experts)), axis=-1)[..., :top_k]
        sequences.append(RandomSequence(experts, weights, decode, token_ids, ahead))
    return sequences


def write_trace(
    path: Path,
    sequences: Sequence[RandomSequence],
    *,
    num_experts: int = 8,
    layer_ids: Sequence[int] | None = None,
    weights: bool = True,
    token_ids: bool = True,
    gate_ahead: bool = False,
    domains: Sequence[str | None] | None = None,
    model: str = "tiny",
) -> Path:
    """Write sequences as a trace and return its path."""
    _, num_layers, top_k = sequences[0].experts.shape
    with TraceWriter(
        path,
        model=model,
        num_experts=num_experts,
        layer_ids=range(num_layers) if layer_ids is None else layer_ids,
        top_k=top_k,
        weights=weights,
        token_ids=token_ids,
        gate_ahead=gate_ahead,
    ) as writer:
        for index, sequence in enumerate(sequences):
            writer.add_sequence(
                sequence.experts,
                decode=sequence.decode,
                weights=sequence.weights if weights else None,
                token_ids=sequence.token_ids if token_ids else None,
                gate_ahead=sequence.gate_ahead if gate_ahead else None,
                domain=None if domains is None else domains[index],
            )
    return path
