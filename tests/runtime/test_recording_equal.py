"""What a server records of its requests is what `profiler trace` records of the same prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from profiler.seam import find_moe_layers
from runtime.recording import start_recording
from runtime.settings import RecordSettings
from runtime.worker_interface import ModelFacts
from tests.support.native import drive, native_model
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.recorded import check_recorded
from tests.support.tiny_models import tiny_model

PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [77], [64, 3, 99, 98]]
ARRIVALS = [0, 0, 0, 3, 5]
NEW_TOKENS = 8


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


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_native_path(family: str, saved_model: Callable[[str], str], tmp_path: Path) -> None:
    model = native_model(saved_model(family), max_prefill_tokens=9)  # the longest prompt takes two passes
    plan = make_plan(saved_model(family), "shuffled", 1)
    layers = find_moe_layers(tiny_model(family))
    facts = ModelFacts("native", 128, torch.float32, 200, (), None, layers[0].expert_bytes)
    settings = RecordSettings(record=str(tmp_path / "routes"), record_rate=1.0, record_token_ids=True)
    model.recording = start_recording(settings, plan, saved_model(family), facts)
    drive(model, PROMPTS, ARRIVALS, NEW_TOKENS)
    model.recording.close()
    check_recorded([tmp_path / "routes-0001.safetensors"], saved_model(family), PROMPTS, NEW_TOKENS)
