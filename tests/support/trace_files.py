"""Traces as other tools may write them: any sequence ids, any metadata, written by the reference library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from profiler.trace_format import RoutingTrace
from tests.support.traces import random_sequences

LAYER_IDS = (1, 2, 5)
EXPERTS, TOP_K = 8, 2


def save_trace(
    path: Path,
    sequences: Mapping[int, int],
    *,
    domains: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
    num_experts: int = EXPERTS,
    layer_ids: Sequence[int] = LAYER_IDS,
    top_k: int = TOP_K,
    seed: int = 0,
    **changed: np.ndarray,
) -> Path:
    """Write a trace and return its path.

    Args:
        path: the output.
        sequences: tokens by sequence id, in the order in which they stand.
        domains: one name per sequence id.
        metadata: further strings, or others than usual.
        without: tensors to leave out.
        num_experts, layer_ids, top_k: shape of the model.
        seed: of the content; token ids start at a thousand times the seed and are unique within it.
        changed: tensors to add, or to put in place of random ones.
    """
    lengths = list(sequences.values())
    routes = random_sequences(lengths, num_layers=len(layer_ids), num_experts=num_experts, top_k=top_k, seed=seed)
    tensors: dict[str, np.ndarray] = {
        "experts": np.concatenate([each.experts for each in routes]).astype(np.uint8),
        "weights": np.concatenate([each.weights for each in routes]),
        "sequence": np.repeat(np.array(list(sequences), np.int32), lengths),
        "position": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        "decode": np.concatenate([each.decode for each in routes]).astype(np.uint8),
        "token_ids": np.arange(sum(lengths), dtype=np.int32) + 1000 * seed,
    }
    told = {
        "format": "routing-trace",
        "version": "1",
        "model": "tiny",
        "num_experts": str(num_experts),
        "layer_ids": json.dumps(list(layer_ids)),
    }
    if domains is not None:
        told["domains"] = json.dumps(list(domains))
    kept = {name: array for name, array in (tensors | changed).items() if name not in without}
    save_file(kept, path, told | dict(metadata or {}))
    return path


def token_records(path: Path) -> list[tuple[Any, ...]]:
    """Every token of a valid trace with all that must survive a copy: its sequence's parity and domain, not its id."""
    with RoutingTrace.open(path) as trace:
        names = sorted(set(trace.columns) - {"sequence"})
        columns = [trace.column(name) for name in names]
        domains = trace.domains
        names_T = ["" if domains is None else domains[sequence] for sequence in trace.sequence()]
        return [
            (int(sequence) % 2, names_T[token], *(column[token].tobytes() for column in columns))
            for token, sequence in enumerate(trace.sequence())
        ]
