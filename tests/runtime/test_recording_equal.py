"""What a server records of its requests is what `profiler trace` records of the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from profiler.seam import find_moe_layers
from runtime.engine import Engine
from runtime.native.worker import NativeWorker
from runtime.recording import start_recording
from runtime.recording_settings import RecordSettings
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.worker_interface import ModelFacts
from tests.support.fake_worker import Listener
from tests.support.native import native_model
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.recorded import check_recorded, read_recorded
from tests.support.tiny_models import tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [77], [64, 3, 99, 98]]
ARRIVALS = [0, 0, 0, 3, 5]
NEW_TOKENS = 8
Serve = Callable[..., tuple[list[Path], int]]


@pytest.mark.parametrize(("family", "exchange", "ranks"), [
    ("demo", "allreduce", 2),
    ("deepseek_v3", "alltoall", 2),
    ("gpt_oss", "alltoall", 1),
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
    check_recorded([tmp_path / "routes-0001.safetensors"], model, PROMPTS, NEW_TOKENS)


@pytest.fixture
def serve_native(saved_model: Callable[[str], str], tmp_path: Path) -> Serve:
    """Serves prompts together while it records; the traces, and how often a request was preempted."""

    def run(family: str, prompts: list[list[int]], new_tokens: int, **settings: Any) -> tuple[list[Path], int]:
        model = native_model(saved_model(family), **settings)
        expert_bytes = find_moe_layers(tiny_model(family))[0].expert_bytes
        facts = ModelFacts(
            "native", 128, torch.float32, model.max_context, (), cache=model.cache_size, expert_bytes=expert_bytes
        )
        group = cast(Any, SimpleNamespace(world_size=1, device=torch.device(settings.get("device", "cpu"))))
        before = set(tmp_path.iterdir())
        worker = NativeWorker(model, facts, group)
        record = RecordSettings(record=str(tmp_path / "routes"), record_rate=1.0, record_token_ids=True)
        worker.record(
            start_recording(record, make_plan(saved_model(family), "shuffled", 1), saved_model(family), facts)
        )
        chosen = EngineSettings(max_prefill_tokens=model.max_prefill_tokens, max_sequences=model.max_sequences)
        engine = Engine(worker, chosen, (), model.max_context)
        engine.start()
        listeners = [Listener() for _ in prompts]
        for prompt, listener in zip(prompts, listeners, strict=True):
            engine.submit(prompt, SamplingParameters(temperature=0, max_tokens=new_tokens, seed=0), listener)
        for listener in listeners:
            assert listener.wait()[-1].finish_reason == "length"
        engine.shutdown()
        assert worker.recording is not None
        worker.recording.close()
        return sorted(set(tmp_path.glob("routes-*.safetensors")) - before), engine.status().preemptions

    return run


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_native_path(family: str, serve_native: Serve, saved_model: Callable[[str], str]) -> None:
    paths, _ = serve_native(family, PROMPTS, NEW_TOKENS, max_prefill_tokens=9)  # long prompts are fed in pieces
    assert not check_recorded(paths, saved_model(family), PROMPTS, NEW_TOKENS)


def test_preempted_requests(serve_native: Serve, saved_model: Callable[[str], str]) -> None:
    paths, preemptions = serve_native("qwen3_moe", PROMPTS, 24, cache_tokens=96)
    assert preemptions
    assert not check_recorded(paths, saved_model("qwen3_moe"), PROMPTS, 24)


def test_tokens_from_the_prefix_cache_have_no_routes(serve_native: Serve) -> None:
    prompt = [20 + (7 * place) % 90 for place in range(40)]
    paths, _ = serve_native("qwen3_moe", [prompt, prompt], NEW_TOKENS, max_sequences=1)
    first, second = read_recorded(paths)
    assert second.position.tolist() == list(range(32, 47))
    np.testing.assert_array_equal(second.token_ids, first.token_ids[32:])
    np.testing.assert_array_equal(second.experts, first.experts[32:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_steps_under_graphs(serve_native: Serve) -> None:
    """Steps are launched before the tokens of the ones before are known, and every graph has routes of its own."""
    found = []
    for graphs in (False, True):
        paths, _ = serve_native("qwen3_moe", PROMPTS, 24, device="cuda", graphs=graphs)
        found.append({tuple(each.token_ids): each.experts for each in read_recorded(paths)})
    eager, graphed = found
    assert eager.keys() == graphed.keys()
    assert len(eager) == len(PROMPTS)
    for tokens, experts in eager.items():
        np.testing.assert_array_equal(graphed[tokens], experts)
