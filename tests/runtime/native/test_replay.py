"""Replayed routes: what is drawn, and that the model really goes where they say."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from conf import ConfigError, compose
from kernels.route import Routes
from profiler.errors import InputError
from profiler.trace_format import TraceWriter
from runtime.replay import active_experts, route_source
from tests.support.native import admission, decode, native_model, prefill, retire
from tests.support.plans import make_plan

PROMPTS = [[5, 6, 7, 8, 9], [100, 11], [20, 21, 22]]
STEPS = 6
ROOT = Path(__file__).resolve().parents[3]


def test_uniform_routes_are_distinct_repeatable_and_spread() -> None:
    source = route_source("uniform", 16, 4, 3, seed=1)
    assert source is not None
    routes = source.draw(50, 7)
    assert routes.shape == (50, 3, 7, 4)
    assert routes.dtype == torch.int32
    ordered = routes.sort(dim=-1).values
    assert (ordered[..., 1:] > ordered[..., :-1]).all()
    counts = torch.bincount(routes.flatten(), minlength=16)
    assert counts.min() > 0.7 * counts.float().mean()
    assert torch.equal(source.draw(50, 7), routes)
    assert not torch.equal(source.draw(50, 7, rank=1), routes)
    assert 4 <= active_experts(routes) <= 16
    assert active_experts(routes[:, :, :1]) == 4


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Six sequences; token t of sequence s goes to experts 4 s + t and the next one in every layer (modulo 32)."""
    path = tmp_path / "trace.safetensors"
    with TraceWriter(
        path, model="m", num_experts=32, layer_ids=[0, 1], top_k=2, weights=False, token_ids=False
    ) as writer:
        for sequence in range(6):
            first = (4 * sequence + np.arange(5)) % 32
            routes = np.stack([first, (first + 1) % 32], axis=-1)[:, None].repeat(2, axis=1)
            writer.add_sequence(routes, decode=np.array([0, 0, 1, 1, 1], dtype=np.uint8))
    return path


def test_a_trace_gives_the_generated_tokens_of_unseen_sequences(trace: Path) -> None:
    source = route_source(str(trace), 32, 2, 2, seed=0)
    assert source is not None
    routes = source.draw(4, 20)
    unseen = {4 * sequence + token for sequence in (1, 3, 5) for token in (2, 3, 4)}
    assert set(routes[..., 0].flatten().tolist()) == unseen
    assert torch.equal(routes[:3, 0, :, 0] - routes[0, 0, :, 0], torch.arange(3)[:, None].expand(3, 20))
    assert torch.equal(routes[..., 1], routes[..., 0] + 1)


def test_what_cannot_be_replayed_is_refused(trace: Path) -> None:
    assert route_source("model", 32, 2, 2, 0) is None
    with pytest.raises(InputError, match="routes=unform: expected model, uniform, or a routing trace"):
        route_source("unform", 32, 2, 2, 0)
    with pytest.raises(InputError, match="32 experts, 2 choices and 2 MoE layers, expected 16"):
        route_source(str(trace), 16, 2, 2, 0)
    with pytest.raises(ConfigError):
        compose("serve", ["routes=uniform"])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_replaying_a_models_own_routes_changes_nothing(family: str, saved_model: Callable[[str], str]) -> None:
    model = native_model(saved_model(family), max_sequences=3)
    layers = model.decoder.shape.num_layers

    def run(routes: torch.Tensor | None, seen: list[Routes] | None = None) -> list[torch.Tensor]:
        prefill(model, [admission(number, prompt, STEPS + 1) for number, prompt in enumerate(PROMPTS)])
        model.replay(routes)
        if seen is not None:
            model.decoder.replace_routes = lambda _, *chosen: (seen.append(chosen[0]), chosen)[1]
        found = []
        for _ in range(STEPS):
            decode(model)
            found.append(torch.cat(model.logits))
        model.replay(None)
        retire(model, model.running)
        return found

    seen: list[Routes] = []
    own = run(None, seen)
    ids = torch.stack([routes.ids for routes in seen]).unflatten(0, (STEPS, layers))
    assert all(torch.equal(a, b) for a, b in zip(own, run(ids), strict=True))
    other = run((ids + 1) % 8)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(own, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, run(None), strict=True))


@pytest.mark.parametrize("path", ["native", "universal"])
def test_bench_marks_its_routes(path: str, saved_model: Callable[[str], str], tmp_path: Path) -> None:
    make_plan(saved_model("qwen3_moe"), "shuffled", 1).save(tmp_path / "plan.json")
    settings = ["batch_sizes=[1,3]", "context=20", "steps=2", "warmup_steps=1", "routes=uniform", f"path={path}"]
    command = [sys.executable, "-m", "runtime", "bench", "decode", "--plan", str(tmp_path / "plan.json")]
    result = subprocess.run(
        [*command, *settings, "device=cpu", "-o", str(tmp_path / "rows.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["engine"], row["routes"], row["batch"]) for row in rows] == [
        (f"expertplan {path}", "uniform", batch) for batch in (1, 3)
    ]
    if path == "native":
        assert rows[0]["active_experts_per_layer"] == 2
        assert rows[1]["bytes_read_per_step"] > rows[0]["bytes_read_per_step"]
