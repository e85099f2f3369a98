"""Loading a rank's experts, and no others, from checkpoints as they are published; and models without a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from profiler.seam import find_moe_layers
from runtime.checkpoint import load_shard
from runtime.errors import ModelError
from runtime.experts import expert_parameter_names
from runtime.random_weights import random_shard
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.tiny_models import tiny_model

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# How their checkpoints keep experts: the first two one by one, the others stacked (the last one with biases).
FAMILIES = ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss")
SLOTS: tuple[list[int], ...] = ([6, 1, 3], [0], [], list(range(8)))


@cache
def whole(family: str) -> PreTrainedModel:
    return tiny_model(family)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model's checkpoint in many files."""
    root = tmp_path_factory.mktemp("sharded")

    def get(family: str) -> Path:
        if not (root / family).exists():
            whole(family).save_pretrained(root / family, max_shard_size="60KB")
        assert len(list((root / family).glob("model-*.safetensors"))) > 2
        return root / family

    return get


def slots_of(family: str, experts: Sequence[int]) -> dict[int, Sequence[int]]:
    """The same experts in every layer, the other way round in every second."""
    layers = [layer.layer_id for layer in find_moe_layers(whole(family))]
    return {layer: list(experts)[:: -1 if layer % 2 else 1] for layer in layers}


@pytest.mark.parametrize("experts", SLOTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_gets_its_experts_and_reads_no_others(
    family: str, experts: list[int], sharded_folder: Callable[[str], Path]
) -> None:
    slots = slots_of(family, experts)
    model, report = load_shard(str(sharded_folder(family)), slots, torch.float32, CPU)
    read = 0
    for layer, original in zip(report.layers, find_moe_layers(whole(family)), strict=True):
        for name in expert_parameter_names(original):
            own, full = layer.experts.get_parameter(name), original.experts.get_parameter(name)
            torch.testing.assert_close(own, full[list(slots[layer.layer_id])], rtol=0, atol=0)
            read += own.nbytes
    assert report.expert_bytes_read == read, "every expert once"
    stacked = {f"{layer.name}.{name}" for layer in report.layers for name in expert_parameter_names_of(layer.experts)}
    expected = dict(whole(family).named_parameters())
    for name, parameter in model.named_parameters():
        if name not in stacked:
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=0)
        assert not parameter.is_meta
    assert not model.training


def expert_parameter_names_of(experts: nn.Module) -> list[str]:
    return [name for name, _ in experts.named_parameters(recurse=False)]


def test_dtypes(sharded_folder: Callable[[str], Path]) -> None:
    path, slots = str(sharded_folder("qwen3_moe")), slots_of("qwen3_moe", [1, 2])
    assert {p.dtype for p in load_shard(path, slots, torch.bfloat16, CPU)[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_shard(path, slots, "auto", CPU)[0].parameters()} == {torch.float32}


@pytest.fixture
def damaged(sharded_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_folder("qwen3_moe"), tmp_path / "model"))


def refuse(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load_shard(str(path), slots_of("qwen3_moe", [0, 1]), torch.float32, CPU)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_missing_shard(damaged: Path) -> None:
    next(damaged.glob("model-00002-*")).unlink()
    assert "model-00002-" in refuse(damaged)


@pytest.mark.parametrize("length", [0, 5, 3000])
def test_truncated_shard(damaged: Path, length: int) -> None:
    os.truncate(next(damaged.glob("model-00002-*")), length)
    refuse(damaged)


def test_tensor_of_another_shape(damaged: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    shard = damaged / json.loads((damaged / "model.safetensors.index.json").read_text())["weight_map"][name]
    save_file(load_file(shard) | {name: torch.zeros(3, 3)}, shard, metadata={"format": "pt"})
    refuse(damaged)


def test_no_such_directory() -> None:
    with pytest.raises(ModelError, match="/no/model: no such directory"):
        load_shard("/no/model", {}, torch.float32, CPU)


def test_a_layer_that_the_plan_does_not_have(sharded_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="no layer 1"):
        load_shard(str(sharded_folder("mixtral")), {0: [0], 2: [0]}, torch.float32, CPU)


# --- memory -----------------------------------------------------------------------------------------------------------

EXPERTS, WIDTH, LAYERS = 64, 512, 2
MEASURE = """
import sys, torch
from runtime.checkpoint import load_shard
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kilobytes("VmRSS")
slots = {layer: range(0, 64, 4) for layer in range(2)}
model, report = load_shard(sys.argv[1], slots, torch.bfloat16, torch.device("cpu"))
print((kilobytes("VmHWM") - before) * 1024, report.expert_bytes_read)
"""


@pytest.fixture
def large_model(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint with 201 MB of experts, stored one by one."""
    generator = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        architectures=["Qwen3MoeForCausalLM"],
    )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    tensors = {
        name: torch.zeros(parameter.shape, dtype=torch.bfloat16)
        for name, parameter in skeleton.named_parameters()
        if ".experts." not in name
    }
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj", "down_proj"):
                values = torch.randint(-9, 9, (WIDTH, WIDTH), generator=generator, dtype=torch.int8)
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = values.to(torch.bfloat16)
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    yield tmp_path
    (tmp_path / "model.safetensors").unlink()


def test_peak_memory_is_that_of_the_own_experts(large_model: Path) -> None:
    """A quarter of the experts: their pages of the file, and their copy, but never the model."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_model)],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, read = map(int, done.stdout.split())
    model_bytes = LAYERS * EXPERTS * 3 * WIDTH * WIDTH * 2
    assert read == model_bytes // 4
    assert peak < 0.8 * model_bytes, f"{peak} of {model_bytes} bytes"


# --- random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "exchange"), [("replicated", "alltoall"), ("uneven", "allreduce")])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_random_weights_are_one_model_under_every_plan(
    family: str,
    kind: str,
    exchange: str,
    rank_pool: Callable[[int], RankPool],
    saved_model: Callable[[str], str],
) -> None:
    path = saved_model(family)
    plan = make_plan(path, kind, 2, exchange, seed=3)
    prompts, new_tokens = [[5, 6, 7, 40], [100, 3]], 6
    job = Job(path, plan.to_dict(), exchange, prompts, [0, 1], new_tokens, random_weights=True)
    results = rank_pool(2).run(job)
    logits = {number: rows for result in results for number, rows in result.logits.items()}
    # In the order of their ids the slots are the experts, and the model is Transformers' own.
    model, _ = random_shard(path, dict.fromkeys(plan.layer_ids, range(8)), torch.float32, CPU)
    for number, prompt in enumerate(prompts):
        fed = torch.tensor([prompt + results[0].tokens[number][:-1]])
        with torch.inference_mode():
            expected = model(fed).logits[0, len(prompt) - 1 :].numpy()
        assert np.abs(expected).max() > 1e-3, "weights of a visible size"
        np.testing.assert_allclose(np.stack(logits[number]), expected, rtol=0, atol=1e-5)


def test_random_weights_differ_between_experts_and_seeds(saved_model: Callable[[str], str]) -> None:
    path, slots = saved_model("qwen3_moe"), slots_of("qwen3_moe", range(8))
    [first, again, other] = [random_shard(path, slots, "auto", CPU, seed)[0] for seed in (0, 0, 1)]
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(first.get_parameter(name)[0], first.get_parameter(name)[1])


def test_random_weights_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no usable config\.json"):
        random_shard(str(tmp_path), {}, torch.float32, CPU)
