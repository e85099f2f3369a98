"""Families whose experts or attention differ from the common form: served right, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from profiler.seam import find_moe_layers
from runtime.batch import CausalModel
from runtime.distributed import FailedElsewhereError
from runtime.engine import Engine
from runtime.errors import ModelError
from runtime.experts import expert_parameter_names
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.start import load_together, load_tokenizer
from tests.support.fake_worker import FakeWorker, Listener
from tests.support.plans import make_plan
from tests.support.rank_pool import Job, RankPool
from tests.support.reference import greedy
from tests.support.tiny_models import FAMILIES, tiny_config, tiny_model

SERVED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next")
TOLERANCE = 1e-4
STEPS = 12
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}
LATENT: dict[str, Any] = {
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
}
SPARSE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 6,
}
# Those that `test_equal_to_transformers.py` leaves out; dbrx, whose experts are stacked in rows, is refused.
OTHER_FAMILIES = sorted(set(FAMILIES) - set(SERVED) - {"dbrx"})


def build(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of Transformers has no {model_type}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def generate(model: PreTrainedModel, prompt: list[int]) -> np.ndarray:
    """Transformers' own float32 logits ``[STEPS, V]``."""
    return greedy(model, prompt, STEPS)[1].numpy()


def test_a_rank_without_sequences_serves_experts_of_another_width(
    rank_pool: Callable[[int], RankPool], tmp_path: Path
) -> None:
    """The experts' width is not the model's here, and rank 1 never sees a token of its own."""
    model = build("nemotron_h", LATENT)
    model.save_pretrained(tmp_path)
    plan = make_plan(str(tmp_path), "shuffled", 2, "alltoall")
    prompt = [5, 6, 7, 8, 9]
    result, _ = rank_pool(2).run(Job(str(tmp_path), plan.to_dict(), "alltoall", [prompt], [0], STEPS))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(np.stack(result.logits[0]), generate(saved, prompt), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_the_other_families_equal_transformers(
    family: str, rank_pool: Callable[[int], RankPool], saved_model: Callable[[str], str]
) -> None:
    path = saved_model(family)
    plan = make_plan(path, "replicated", 2, "alltoall")
    prompts = [list(range(20, 33)), [100, 11, 12], [64, 3], [77]]
    results = rank_pool(2).run(Job(path, plan.to_dict(), "alltoall", prompts, [0, 0, 0, 2], STEPS))
    logits = {number: rows for result in results for number, rows in result.logits.items()}
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for number, prompt in enumerate(prompts):
        np.testing.assert_allclose(np.stack(logits[number]), generate(saved, prompt), rtol=0, atol=TOLERANCE)


def test_sparse_attention_is_right_without_padding() -> None:
    model = CausalModel(build("deepseek_v32", SPARSE))
    assert not model.can_pad
    assert CausalModel(tiny_model("mixtral")).can_pad
    prompts = [[64, 3, 9], [5, 6, 7]]
    expected = [generate(model.model, prompt) for prompt in prompts]
    batch, logits = model.prefill([0, 1], prompts)
    for step in range(STEPS):
        for row in range(2):
            np.testing.assert_allclose(logits[row], expected[row][step], rtol=0, atol=TOLERANCE)
        logits = model.decode(batch, logits.argmax(dim=-1).tolist())


def test_prompts_of_unequal_length_are_not_padded_together_where_that_goes_wrong() -> None:
    worker: Any = FakeWorker(can_merge=False, can_pad=False)
    engine = Engine(worker, EngineSettings(), [], max_context=100)
    listeners = [Listener() for _ in range(5)]
    for listener, length in zip(listeners, (3, 3, 2, 2, 3), strict=True):
        engine.submit([5] * length, SamplingParameters(max_tokens=2), listener)
    engine.start()
    for listener in listeners:
        listener.wait()
    engine.shutdown()
    assert worker.admitted == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("window_of", ["mixtral", "phimoe"])
def test_decoding_beyond_a_sliding_window(window_of: str) -> None:
    """The cache keeps every position, the mask alone cuts the window; rows are padded and one leaves in between."""
    config = tiny_config(window_of)
    config.sliding_window = 6
    torch.manual_seed(0)
    model = CausalModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    prompts = [list(range(20, 33)), [64, 3]]
    expected = generate(model.model, prompts[1])
    batch, logits = model.prefill([0, 1], prompts)
    for step in range(STEPS):
        np.testing.assert_allclose(logits[-1], expected[step], rtol=0, atol=TOLERANCE)
        if step == STEPS // 2:
            batch.keep([1])
            logits = logits[1:]
        logits = model.decode(batch, logits.argmax(dim=-1).tolist())


def test_experts_that_are_not_all_stacked_are_refused() -> None:
    """Identity experts without weights: renumbered, they would be taken for others."""
    with pytest.raises(ModelError, match="cannot shard"):
        expert_parameter_names(find_moe_layers(tiny_model("dbrx"))[0])
    with torch.device("meta"):
        layer = find_moe_layers(tiny_model("mixtral"))[0]
    layer.experts.down_proj = torch.nn.Parameter(layer.experts.get_parameter("down_proj")[:-1].clone())
    with pytest.raises(ModelError, match=r"down_proj has shape \[7, .*cannot shard"):
        expert_parameter_names(layer)


def test_a_model_without_its_tokenizer_is_refused(saved_model: Callable[[str], str], tmp_path: Path) -> None:
    """Transformers makes an empty tokenizer there, which knows no text."""
    assert load_tokenizer(saved_model("demo"))("In the beginning")["input_ids"]
    shutil.copy(Path(saved_model("demo")) / "config.json", tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_worker(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("runtime.start.load_worker", load_worker)
    group: Any = SimpleNamespace(rank=0, device="cuda:0", gather_text=lambda text: [text], close=lambda: None)
    with pytest.raises(ModelError, match=r"does not fit into cuda:0; plan for more GPUs or fewer slots"):
        load_together(None, "big", EngineSettings(), group)  # type: ignore[arg-type]


def test_the_rank_that_failed_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_worker(*_: Any) -> None:
        raise FailedElsewhereError

    monkeypatch.setattr("runtime.start.load_worker", load_worker)
    group: Any = SimpleNamespace(rank=0, gather_text=lambda text: [text, "lacks a tensor"], close=lambda: None)
    with pytest.raises(ModelError, match="rank 1: lacks a tensor"):
        load_together(None, "any", EngineSettings(), group)  # type: ignore[arg-type]
