"""Finding the experts of a model, and telling one configuration from another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from profiler.errors import ModelError
from profiler.fingerprint import model_fingerprint
from profiler.recorder import require_one_shape
from profiler.seam import MoELayer, find_moe_layers
from tests.support.tiny_models import FAMILIES, tiny_config, tiny_model

DENSE_FIRST = ("deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "exaone_moe", "dots1", "lfm2_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_without_weights(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        layers = find_moe_layers(AutoModelForCausalLM.from_config(config))
    all_layers = list(range(config.num_hidden_layers))
    expected = all_layers[1::2] if family == "jamba" else all_layers[family in DENSE_FIRST :]
    assert [layer.layer_id for layer in layers] == expected
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(4 if family == "jamba" else 8, 2)}
    assert all(layer.name.endswith(".experts") for layer in layers)


def test_expert_bytes() -> None:
    [layer, *_] = find_moe_layers(tiny_model("mixtral"))
    assert layer.expert_bytes == 3 * 32 * 48 * 4
    [layer, *_] = find_moe_layers(tiny_model("mixtral").to(torch.bfloat16))
    assert layer.expert_bytes == 3 * 32 * 48 * 2


def test_a_dense_model_is_refused() -> None:
    config = AutoConfig.for_model("llama", vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    with torch.device("meta"), pytest.raises(ModelError, match="LlamaForCausalLM has no MoE layer"):
        find_moe_layers(AutoModelForCausalLM.from_config(config))


def test_layers_of_different_shape_are_refused() -> None:
    layers = [MoELayer(layer, "experts", torch.nn.Identity(), 8, top_k) for layer, top_k in enumerate((2, 2, 4))]
    require_one_shape(layers[:2])
    with pytest.raises(ModelError, match=r"top-2 of 8 in layer 1, top-4 of 8 in layer 2"):
        require_one_shape(layers)


def write_config(folder: Path, config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


def test_the_fingerprint_follows_the_configuration(tmp_path: Path) -> None:
    base = {"hidden_size": 8, "text_config": {"num_experts": 4, "dtype": "float32"}, "transformers_version": "5"}
    reordered = {"text_config": {"dtype": "bfloat16", "num_experts": 4}, "hidden_size": 8, "torch_dtype": "float16"}
    changed = {"hidden_size": 8, "text_config": {"num_experts": 5}}
    first, second, third = (
        model_fingerprint(write_config(tmp_path / str(n), config))
        for n, config in enumerate((base, reordered, changed))
    )
    assert first == second != third
    assert len(first) == 64


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        model_fingerprint(str(tmp_path))
    with pytest.raises(ModelError, match="no such model folder"):
        model_fingerprint(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="no such model folder"):
        model_fingerprint("./missing")
    with pytest.raises(ModelError, match="not readable as JSON"):
        model_fingerprint(write_config(tmp_path / "broken", "{"))
    with pytest.raises(ModelError, match="expected a JSON object"):
        model_fingerprint(write_config(tmp_path / "broken", "[]"))
