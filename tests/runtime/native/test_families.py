"""Which models the native path takes, and what it says of the others."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoConfig

from runtime.errors import ModelError
from runtime.native.deepseek import LatentShape, Routing
from runtime.native.families import NotNativeError, read_shape
from runtime.native.loading import choose_native
from runtime.native.rope import rotary_table
from runtime.settings import EngineSettings
from tests.support.tiny_models import tiny_config

SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
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
        ("glm4_moe", {}, "family glm4_moe"),
        ("deepseek_v2_lite", {"kv_lora_rank": 24}, "kv_lora_rank 24: .* expects 16 or 32"),
        ("deepseek_v2_lite", {"qk_rope_head_dim": 8}, "qk_rope_head_dim 8"),
        ("deepseek_v2_lite", {"topk_method": "noaux_tc"}, "topk_method noaux_tc: .* expects greedy or group_limited"),
        ("deepseek_v2_lite", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("deepseek_v2_lite", {"rope_parameters": DYNAMIC}, "rope type dynamic"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias True"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias True"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method greedy: .* expects noaux_tc"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func softmax: .* expects sigmoid"),
        ("qwen3_moe", {"head_dim": 24}, "head size 24"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
        ("qwen3_moe", {"rope_parameters": DYNAMIC}, "rope type dynamic"),
    ],
)
def test_others_stay_on_the_universal_path(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved_config(tmp_path, family, **changes)
    with caplog.at_level(logging.INFO):
        assert choose_native(path, EngineSettings(), GPU_GROUP) is None
    assert "universal path" in caplog.text
    assert re.search(reason, caplog.text)
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
    assert choose_native(path, EngineSettings(), on_two) is not None
    assert choose_native(path, EngineSettings(), on_two, "alltoall") is not None
    assert choose_native(path, EngineSettings(), on_two, "relay") is None
    with pytest.raises(ModelError, match="exchange relay of 2 ranks; the native path has allreduce, alltoall"):
        choose_native(path, EngineSettings(path="native"), on_two, "relay")
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


def test_the_published_lite_model() -> None:
    """Its configuration gives the sizes and the factor of the scores that its paper and its code state."""
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "deepseek-v2-lite"))
    assert shape.latent == LatentShape(512, None, 128, 64, 128, shape.scale, True)
    assert shape.scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert shape.routing == Routing(float32=True)
    assert (shape.num_experts, shape.top_k, shape.renormalise, shape.shared_width) == (64, 6, False, 2816)
    assert (shape.moe_layers, shape.dense_width) == ((False,) + (True,) * 26, 10944)
    assert shape.kv_values_per_token == 27 * 576


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
