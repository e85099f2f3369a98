"""Weights land where the operators read them, whatever the order of slots; broken checkpoints are told in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from runtime.errors import ModelError
from runtime.native import loading
from runtime.native.cache import PAGE_SIZE
from runtime.native.checkpoint import fill_from_checkpoint, fill_with_random
from runtime.native.families import read_shape
from runtime.native.heads import HeadShare
from runtime.native.loading import cache_tokens, prefill_bytes, step_reads
from runtime.native.weights import DecoderWeights, Part, allocate
from runtime.settings import EngineSettings
from tests.support.native import native_model
from tests.support.tiny_models import tiny_model

CPU = torch.device("cpu")


def make_room(path: str, held: list[int], dtype: torch.dtype = torch.float32) -> tuple[DecoderWeights, list[Part]]:
    shape = read_shape(AutoConfig.from_pretrained(path))
    weights, parts = allocate(shape, dict.fromkeys(range(shape.num_layers), held), dtype, CPU)
    for part in parts:
        part.destination.fill_(torch.nan)
    return weights, parts


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_slots_hold_their_experts_and_nothing_is_left_out(family: str, saved_model: Callable[[str], str]) -> None:
    path = saved_model(family)
    whole, parts = make_room(path, list(range(8)))
    fill_from_checkpoint(path, parts)
    some, some_parts = make_room(path, [5, 0, 7])
    fill_from_checkpoint(path, some_parts)
    assert not any(part.destination.isnan().any() for part in (*parts, *some_parts))
    dense = family == "deepseek_v3"  # its first layer
    for mine, all_of in zip(some.layers[dense:], whole.layers[dense:], strict=True):
        assert mine.experts is not None
        assert all_of.experts is not None
        assert mine.experts.slot_of_expert.tolist() == [1, -1, -1, -1, -1, 0, -1, 2]
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            expected = getattr(all_of.experts, name)
            if expected is not None:
                assert torch.equal(getattr(mine.experts, name), expected[[5, 0, 7]])


def test_dtype_is_converted_while_loading(saved_model: Callable[[str], str]) -> None:
    path = saved_model("qwen3_moe")
    exact, parts = make_room(path, list(range(8)))
    fill_from_checkpoint(path, parts)
    rounded, parts = make_room(path, list(range(8)), torch.bfloat16)
    fill_from_checkpoint(path, parts)
    assert torch.equal(rounded.layers[1].qkv, exact.layers[1].qkv.bfloat16())


def test_random_weights_are_one_model_for_every_order_of_slots(saved_model: Callable[[str], str]) -> None:
    drawn = []
    for held in (list(range(8)), [5, 0, 7]):
        weights, parts = make_room(saved_model("gpt_oss"), held)
        fill_with_random(parts)
        assert not any(part.destination.isnan().any() for part in parts)
        drawn.append(weights)
    whole, some = (weights.layers[0] for weights in drawn)
    assert whole.experts is not None
    assert some.experts is not None
    assert torch.equal(some.experts.gate_up, whole.experts.gate_up[[5, 0, 7]])
    assert torch.equal(some.qkv, whole.qkv)
    assert len({float(expert.flatten()[0]) for expert in whole.experts.down}) == 8
    assert float(whole.input_norm.min()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            "lacks .*experts.3.up_proj.weight",
        ),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}), r"model.norm.weight: shape \[33\]"),
    ],
)
def test_broken_checkpoints(change: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    _, parts = make_room(str(tmp_path), list(range(8)))
    with pytest.raises(ModelError, match=reason) as error:
        fill_from_checkpoint(str(tmp_path), parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "name", "cut"),
    [
        ("qwen3_moe", "self_attn.q_proj.weight", lambda whole: whole[: len(whole) // 2]),
        ("qwen3_moe", "self_attn.o_proj.weight", lambda whole: whole[:, : whole.shape[1] // 2]),
        ("qwen3_moe", "self_attn.o_proj.weight", lambda whole: whole[0]),
        ("gpt_oss", "mlp.experts.down_proj", lambda whole: whole[:4]),
        ("gpt_oss", "mlp.experts.gate_up_proj", lambda whole: whole[..., None]),
    ],
)
def test_shapes_of_another_model(
    family: str, name: str, cut: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """Also half a tensor where a rank takes half of the heads, whose shape would fit."""
    tiny_model(family).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.{name}"
    tensors[name] = cut(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    shape = read_shape(AutoConfig.from_pretrained(tmp_path))
    share = HeadShare.choose(shape, 1, 2)
    held = dict.fromkeys(range(shape.num_layers), range(shape.num_experts))
    _, parts = allocate(share.shape_of(shape), held, torch.float32, CPU)
    with pytest.raises(ModelError, match=f"{name}: shape .* expected .* of another model"):
        fill_from_checkpoint(str(tmp_path), [share.part_of(part) for part in parts])


def test_truncated_files(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    _, parts = make_room(str(tmp_path), list(range(8)))
    with pytest.raises(ModelError, match="cannot be loaded"):
        fill_from_checkpoint(str(tmp_path), parts)


@pytest.mark.parametrize("content", ["[]", "{}", "not JSON", '{"weight_map": {"a": 1}}'])
def test_broken_list_of_tensors(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="no list of tensors") as error:
        fill_from_checkpoint(str(tmp_path), [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [10**12, 10**18])
def test_a_cache_beyond_memory_is_told_in_a_line(tokens: int, saved_model: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=f"cache_tokens={tokens}: .* give fewer"):
        native_model(saved_model("qwen3_moe"), cache_tokens=tokens)


def test_the_cache_takes_what_memory_and_sequences_allow(saved_model: Callable[[str], str]) -> None:
    shape = read_shape(AutoConfig.from_pretrained(saved_model("qwen3_moe")))
    settings = EngineSettings(max_sequences=2)
    bytes_per_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, kv heads, head size, float32
    assert cache_tokens(shape, settings, torch.float32, 100 * bytes_per_token) == 100
    assert cache_tokens(shape, settings, torch.float32, 1 << 40) == 2 * (shape.max_positions + PAGE_SIZE)
    for free in (10 * bytes_per_token, -1):
        with pytest.raises(ModelError, match="MiB are left"):
            cache_tokens(shape, settings, torch.float32, free)


def test_long_prefills_set_more_memory_aside(saved_model: Callable[[str], str]) -> None:
    shape = read_shape(AutoConfig.from_pretrained(saved_model("qwen3_moe")))
    short, long = (
        prefill_bytes(shape, EngineSettings(max_prefill_tokens=tokens), torch.bfloat16) for tokens in (1024, 8192)
    )
    assert long - short >= 7168 * shape.top_k * (shape.expert_width + shape.width) * 2


@pytest.mark.parametrize(
    ("family", "cached"), [("qwen3_moe", 2 * 2 * 8), ("deepseek_v2_lite", 16 + 16), ("deepseek_v2", 16 + 16)]
)
def test_bytes_of_a_step(family: str, cached: int, saved_model: Callable[[str], str]) -> None:
    """With every expert active, a step reads every weight once but the embedding, norms and biases."""
    reads = step_reads(native_model(saved_model(family)).decoder)
    tensors = load_file(Path(saved_model(family)) / "model.safetensors")
    weights = sum(t.nbytes for name, t in tensors.items() if t.ndim == 2 and "embed" not in name)
    assert reads.total(8, 0, 0) == weights
    assert reads.total(0, 3, 10) - reads.total(0, 0, 10) == 3 * 10 * 3 * cached * 4


def test_a_rank_that_cannot_take_its_steps_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It must not wait for the others: their GPUs wait for its rows."""

    def steps() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    loading._take_steps(steps, cast(Any, SimpleNamespace(rank=1, world_size=2)))
    assert ended == [1]
    assert "error: rank 1 stopped: no memory for the steps' graphs" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        loading._take_steps(steps, cast(Any, SimpleNamespace(rank=0, world_size=1)))
