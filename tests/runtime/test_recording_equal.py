"""What a server records of its requests is what `profiler trace` records of the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from profiler.fingerprint import model_fingerprint
from profiler.recorder import record_routes
from profiler.seam import find_moe_layers
from profiler.trace_format import RoutingTrace
from profiler.trace_validation import validate_trace
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool

PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [77], [64, 3, 99, 98]]
ARRIVALS = [0, 0, 0, 3, 5]
NEW_TOKENS = 12


def check_trace(path: Path, model_path: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Compare a recorded trace with the profiler's own, sequence by sequence; they may have ended in another order."""
    model = AutoModelForCausalLM.from_pretrained(model_path).float().eval()
    model.generation_config.eos_token_id = None  # the requests go on after it, too
    layers = find_moe_layers(model)
    with RoutingTrace.open(path) as trace:
        validate_trace(trace)
        assert trace.layer_ids == tuple(layer.layer_id for layer in layers)
        assert (trace.num_experts, trace.top_k) == (layers[0].num_experts, layers[0].top_k)
        assert trace.model_fingerprint == model_fingerprint(model_path)
        assert trace.expert_bytes == layers[0].expert_bytes
        token_ids = trace.token_ids()
        assert token_ids is not None
        starts = np.flatnonzero(np.diff(trace.sequence(), prepend=-1))
        assert len(starts) == len(prompts)
        found = {}
        for start, stop in zip(starts, [*starts[1:], trace.num_tokens], strict=True):
            part = slice(start, stop)
            found[tuple(token_ids[part])] = (
                trace.experts()[part].copy(),
                trace.decode()[part].copy(),
                trace.position()[part].copy(),
            )
    for prompt in prompts:
        [expected] = record_routes(model, [prompt], batch_size=1, max_new_tokens=new_tokens)
        experts, decode, position = found[tuple(expected.token_ids)]
        np.testing.assert_array_equal(experts, expected.experts)
        np.testing.assert_array_equal(decode, expected.decode)
        np.testing.assert_array_equal(position, np.arange(len(expected.experts)))


@pytest.mark.parametrize(("family", "exchange", "ranks"), [
    ("qwen3_moe", "allreduce", 1),
    ("demo", "allreduce", 2),
    ("deepseek_v3", "alltoall", 2),
    ("gpt_oss", "alltoall", 1),
    ("granitemoe", "alltoall", 2),
    ("qwen3_next", "allreduce", 2),
])  # fmt: skip
def test_universal_path(
    family: str,
    exchange: str,
    ranks: int,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
    tmp_path: Path,
) -> None:
    model = saved_model(family)
    plan = make_plan(model, "replicated", ranks, exchange)
    job = Job(model, plan.to_dict(), exchange, PROMPTS, ARRIVALS, NEW_TOKENS, record=str(tmp_path / "routes"))
    rank_pool(ranks).run(job)
    check_trace(tmp_path / "routes-0001.safetensors", model, PROMPTS, NEW_TOKENS)
