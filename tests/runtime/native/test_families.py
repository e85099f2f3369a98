"""Which models the native path takes, and what it says of the others."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.errors import ModelError
from runtime.native.families import NotNativeError, read_shape
from runtime.native.loading import choose_native
from runtime.native.rope import rotary_table
from runtime.settings import EngineSettings
from tests.support.tiny_models import tiny_config

GPU_GROUP = cast(Any, SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda")))


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def saved_config(folder: Any, family: str, **changes: Any) -> str:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("deepseek_v3", {}, "family deepseek_v3"),
        ("qwen3_moe", {"head_dim": 24}, "head size 24"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope type dynamic",
        ),
    ],
)
def test_others_stay_on_the_universal_path(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_config(tmp_path, family, **changes)
    with caplog.at_level(logging.INFO):
        assert choose_native(path, EngineSettings(), GPU_GROUP) is None
    assert "universal path" in caplog.text
    assert reason in caplog.text
    with pytest.raises(ModelError, match=f"path=native: .*{reason}.*path=universal"):
        choose_native(path, EngineSettings(path="native"), GPU_GROUP)
    assert choose_native(path, EngineSettings(path="universal"), GPU_GROUP) is None


def test_the_choice_by_device_and_ranks(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    path = saved_config(tmp_path, "qwen3_moe")
    with caplog.at_level(logging.INFO):
        assert choose_native(path, EngineSettings(), GPU_GROUP) is not None
    assert "native path: qwen3_moe on cuda" in caplog.text
    on_cpu = cast(Any, SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu")))
    assert choose_native(path, EngineSettings(), on_cpu) is None
    assert choose_native(path, EngineSettings(path="native"), on_cpu) is not None
    on_two = cast(Any, SimpleNamespace(rank=0, world_size=2, device=torch.device("cuda")))
    assert choose_native(path, EngineSettings(), on_two) is None
    with pytest.raises(ModelError, match="2 ranks"):
        choose_native(path, EngineSettings(path="native"), on_two)
    with pytest.raises(ModelError, match="path=fast"):
        EngineSettings(path="fast")


@pytest.mark.parametrize(
    ("generation", "reason"), [(8, "compute capability 8.x"), (10, "never run"), (12, "compute capability 12.x")]
)
def test_other_gpus_stay_on_the_universal_path(
    generation: int, reason: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    path = saved_config(tmp_path, "qwen3_moe")
    with caplog.at_level(logging.INFO):
        assert choose_native(path, EngineSettings(), GPU_GROUP) is None
    assert reason in caplog.text
    if generation == 10:
        assert choose_native(path, EngineSettings(path="native"), GPU_GROUP) is not None
    else:
        with pytest.raises(ModelError, match=reason):
            choose_native(path, EngineSettings(path="native"), GPU_GROUP)


def test_weights_of_a_dtype_that_no_kernel_takes(tmp_path: Any) -> None:
    path = saved_config(tmp_path, "qwen3_moe", dtype=torch.float64)
    assert choose_native(path, EngineSettings(), GPU_GROUP) is None
    assert choose_native(path, EngineSettings(dtype="bfloat16"), GPU_GROUP) is not None


def test_dense_layers_and_windows() -> None:
    config = tiny_config("qwen3_moe")
    config.mlp_only_layers = [0]
    assert read_shape(config).moe_layers == (False, True, True)
    config.decoder_sparse_step = 3
    assert read_shape(config).moe_layers == (False, False, True)
    assert read_shape(tiny_config("gpt_oss")).windows == (8, None)
    assert read_shape(tiny_config("mixtral")).windows == (None,) * 3
    with pytest.raises(NotNativeError, match="phimoe"):
        read_shape(tiny_config("phimoe"))


@pytest.mark.parametrize("rope_type", ["default", "linear", "yarn"])
def test_rotary_table(rope_type: str) -> None:
    """The table is what Transformers' embedding gives, scaling included."""
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    config = tiny_config("mixtral")
    config.head_dim = 8
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0} | (
        {"original_max_position_embeddings": 64} if rope_type == "yarn" else {}
    )
    table = rotary_table(config, read_shape(config), 200, torch.device("cpu"))
    cos, sin = MixtralRotaryEmbedding(config)(torch.zeros(1), torch.arange(200)[None])
    torch.testing.assert_close(table[:, 0], cos[0, :, : table.shape[2]])
    torch.testing.assert_close(table[:, 1], sin[0, :, : table.shape[2]])
