"""On a GPU: bfloat16 against float32 with the same routes, float32 against Transformers, graphs against eager steps."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kernels.permute import Permutation, permute
from kernels.route import Routes
from runtime.native import model as native
from runtime.native.model import NativeModel
from runtime.native.worker import NativeWorker
from runtime.settings import EngineSettings
from runtime.worker_interface import ModelFacts
from tests.support.native import Recording, admission, decode, drive, native_model, prefill, retire
from tests.support.plans import make_plan
from tests.support.reference import greedy
from tests.support.schedules import Arrival, Play
from tests.support.tiny_models import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], list(range(20, 61)), [77], [64, 3, 99, 98]]
ARRIVALS = [0, 0, 0, 3, 5]
DEEPSEEK = ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3")
FAMILIES = ("qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", *DEEPSEEK, "demo")
STEPS = 24
ROOT = Path(__file__).resolve().parents[3]


def rounded(model: NativeModel) -> NativeModel:
    """The same float32 model with weights that bfloat16 can hold."""
    weights = model.decoder.weights
    tensors = [weights.embedding, weights.head, weights.norm]
    for layer in weights.layers:
        for part in (layer, layer.experts, layer.mlp):
            tensors += [value for value in vars(part).values() if isinstance(value, torch.Tensor)] if part else []
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())
    return model


def feed(model: NativeModel, tokens: list[list[int]]) -> list[np.ndarray]:
    """Prefill all prompts and feed given tokens instead of those sampled; logits ``[B, V]`` of every step."""
    prefill(model, [admission(number, prompt, STEPS + 1) for number, prompt in enumerate(PROMPTS)])
    found = []
    for step in range(STEPS):
        found.append(torch.cat(model.logits).float().cpu().numpy())
        for sequence, token in zip(model._sequences.values(), tokens[step], strict=True):
            sequence.token = token
        model._filled = None
        decode(model)
    retire(model, model.running)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_with_equal_routes(family: str, saved_model: Callable[[str], str]) -> None:
    path = saved_model(family)
    generator = np.random.default_rng(0)
    tokens = generator.integers(4, 120, (STEPS, len(PROMPTS))).tolist()
    seen: list[Routes] = []
    reference = rounded(native_model(path))
    reference.decoder.replace_routes = lambda _, *chosen: (seen.append(chosen[0]), chosen)[1]
    expected = feed(reference, tokens)

    tested = native_model(path, device="cuda", dtype=torch.bfloat16)
    replayed = iter(seen)
    experts = [layer.experts for layer in tested.decoder.weights.layers]

    def replace(layer: int, routes: Routes, permutation: Permutation) -> tuple[Routes, Permutation]:
        ids, _, given = (tensor.cuda() for tensor in next(replayed))
        table = experts[layer]
        assert table is not None
        slots = table.slot_of_expert[ids.long()]
        same = ids[:, :, None] == routes.ids[:, None]
        weights = (same * routes.weights[:, None]).sum(2).where(same.any(2), given)  # given to what it did not choose
        return Routes(ids, slots, weights), permute(slots, len(table.gate_up))

    tested.decoder.replace_routes = replace
    found, wanted = np.stack(feed(tested, tokens)), np.stack(expected)
    error = np.linalg.norm(found - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    assert error.mean() < 2e-2
    assert error.max() < 4e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite"])
def test_float32_equals_transformers(family: str, saved_model: Callable[[str], str]) -> None:
    recording = drive(native_model(saved_model(family), device="cuda"), PROMPTS, ARRIVALS, STEPS)
    for number, prompt in enumerate(PROMPTS):
        tokens, logits = greedy(tiny_model(family), prompt, STEPS)
        np.testing.assert_allclose(np.stack(recording.logits[number]), logits.numpy(), rtol=0, atol=1e-3)
        assert recording.tokens[number] == tokens


@pytest.fixture
def narrow_tables() -> Iterator[None]:
    """Page tables so narrow that contexts outgrow them."""
    before = native.LEAST_PAGES
    native.LEAST_PAGES = 1
    yield
    native.LEAST_PAGES = before


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2_lite"])
@pytest.mark.usefixtures("narrow_tables")
def test_graphs_give_the_bits_of_eager_steps(family: str, saved_model: Callable[[str], str]) -> None:
    """Whatever joins, leaves, grows out of its page table or is padded."""

    def run(graphs: bool) -> Recording:
        settings: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "graphs": graphs}
        return drive(native_model(saved_model(family), **settings), PROMPTS, ARRIVALS, STEPS)

    eager, graphed = run(False), run(True)
    assert eager.tokens == graphed.tokens
    for number in range(len(PROMPTS)):
        assert np.array_equal(np.stack(eager.logits[number]), np.stack(graphed.logits[number]))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.usefixtures("narrow_tables")
def test_an_engine_ahead_of_its_tokens(family: str, saved_model: Callable[[str], str]) -> None:
    """Steps are launched before the last one's tokens are known; pages come as they are needed, and go."""
    model = native_model(saved_model(family), device="cuda", graphs=True, cache_tokens=80, max_prefill_tokens=24)
    group: Any = SimpleNamespace(world_size=1, device=torch.device("cuda"))
    facts = ModelFacts("native", 128, torch.float32, model.max_context, (), cache=model.cache_size)
    schedule = [Arrival(arrival, tuple(prompt), STEPS) for prompt, arrival in zip(PROMPTS, ARRIVALS, strict=True)]
    chosen = EngineSettings(max_sequences=8, max_prefill_tokens=24)
    played = Play(NativeWorker(model, facts, group), chosen, schedule, model.max_context)
    played.check_against([greedy(tiny_model(family), prompt, STEPS)[0] for prompt in PROMPTS])
    assert played.status.preemptions > 0


def test_replayed_routes_reach_the_graph(saved_model: Callable[[str], str]) -> None:
    model = native_model(saved_model("qwen3_moe"), device="cuda", dtype=torch.bfloat16, graphs=True)
    layers = model.decoder.shape.num_layers

    def run(routes: torch.Tensor) -> list[torch.Tensor]:
        prefill(model, [admission(number, prompt, 5) for number, prompt in enumerate(PROMPTS[:3])])
        model.replay(routes)
        found = []
        for _ in range(3):
            decode(model)
            found.append(torch.cat(model.logits))
        model.replay(None)
        retire(model, model.running)
        return found

    ids = torch.tensor([[4, 1], [2, 6], [7, 0]], dtype=torch.int32).expand(3, layers, 3, 2).contiguous()
    first, again, other = run(ids), run(ids), run((ids + 1) % 8)
    for a, b, c in itertools.zip_longest(first, again, other):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def generate(plan: Path, *settings: str) -> str:
    """What `python -m runtime generate` prints: loaded and captured in one thread, decoded in the engine's."""
    command = [sys.executable, "-m", "runtime", "generate", "--plan", str(plan), "--prompt", "In the beginning"]
    result = subprocess.run(
        [*command, "device=cuda", "dtype=float32", "max_tokens=32", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_line_captures_before_it_serves(tmp_path: Path) -> None:
    """With the cache of the default size, every size of step captured, and the nucleus' step when it is first asked."""
    plan = tmp_path / "plan.json"
    make_plan(str(ROOT / "examples/demo-moe"), "shuffled", 1).save(plan)
    assert generate(plan, "path=native", "temperature=0") == generate(plan, "path=universal", "temperature=0")
    nucleus = ["path=native", "temperature=1", "top_p=0.9", "seed=5"]
    assert generate(plan, *nucleus) == generate(plan, *nucleus)
