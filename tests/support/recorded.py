"""Traces that a server recorded, against the profiler's own of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM

from profiler.fingerprint import model_fingerprint
from profiler.recorder import record_routes
from profiler.seam import find_moe_layers
from profiler.trace_format import RoutingTrace
from profiler.trace_validation import validate_trace


@dataclass(frozen=True)
class Recorded:
    """One sequence: experts ``[T, L, K]``, the others ``[T]``."""

    token_ids: np.ndarray
    experts: np.ndarray
    decode: np.ndarray
    position: np.ndarray


def read_recorded(paths: Sequence[Path]) -> list[Recorded]:
    """All sequences of traces with token ids, in the order in which they ended."""
    found = []
    for path in paths:
        with RoutingTrace.open(path) as trace:
            validate_trace(trace)
            token_ids = trace.token_ids()
            assert token_ids is not None
            columns = (token_ids, trace.experts(), trace.decode(), trace.position())
            starts = np.flatnonzero(np.diff(trace.sequence(), prepend=-1))
            for start, stop in zip(starts, [*starts[1:], trace.num_tokens], strict=True):
                found.append(Recorded(*(column[start:stop].copy() for column in columns)))
    return found


def check_recorded(
    paths: Sequence[Path], model_path: str, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Recorded]:
    """Compare traces with what the profiler records of the same prompts; sequences that are left are returned."""
    model = AutoModelForCausalLM.from_pretrained(model_path).float().eval()
    model.generation_config.eos_token_id = None  # the requests go on after it, too
    layers = find_moe_layers(model)
    for path in paths:
        with RoutingTrace.open(path) as trace:
            assert trace.layer_ids == tuple(layer.layer_id for layer in layers)
            assert (trace.num_experts, trace.top_k) == (layers[0].num_experts, layers[0].top_k)
            assert trace.model_fingerprint == model_fingerprint(model_path)
            assert trace.expert_bytes == layers[0].expert_bytes
    found = {tuple(recorded.token_ids): recorded for recorded in read_recorded(paths)}
    for prompt in prompts:
        [expected] = record_routes(model, [prompt], batch_size=1, max_new_tokens=new_tokens)
        recorded = found.pop(tuple(expected.token_ids))
        np.testing.assert_array_equal(recorded.experts, expected.experts)
        np.testing.assert_array_equal(recorded.decode, expected.decode)
        np.testing.assert_array_equal(recorded.position, np.arange(len(expected.experts)))
    return list(found.values())
