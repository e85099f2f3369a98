"""The recorder beyond plain greedy batches: ends, sampling, and models that a trace cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from profiler.errors import ModelError
from profiler.recorder import RouteRecorder, SequenceRoutes, record_routes
from profiler.seam import find_moe_layers
from tests.support.tiny_models import tiny_model

PROMPTS = [[5, 6, 7], [9] * 8, [11, 12], [50, 40, 30, 20], [77]]


def record(model: Any, **settings: Any) -> list[SequenceRoutes]:
    return list(record_routes(model, PROMPTS, **{"batch_size": 2, "max_new_tokens": 8} | settings))


def assert_same(left: list[SequenceRoutes], right: list[SequenceRoutes]) -> None:
    for a, b in zip(left, right, strict=True):
        for name in ("experts", "weights", "token_ids", "decode"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_last_generated_token_has_no_routes() -> None:
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = None
    for prompt, routes in zip(PROMPTS, record(model), strict=True):
        assert len(routes.experts) == len(prompt) + 8 - 1
        assert routes.token_ids[: len(prompt)].tolist() == prompt
    for prompt, routes in zip(PROMPTS, record(model, max_new_tokens=1), strict=True):
        assert routes.token_ids.tolist() == prompt
        assert not routes.decode.any()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_nothing_is_kept_of_what_follows_an_end_token(batch_size: int) -> None:
    model = tiny_model("mixtral")
    model.generation_config.eos_token_id = None
    whole = record(model, max_new_tokens=12)
    generated = [routes.token_ids[len(prompt) :].tolist() for prompt, routes in zip(PROMPTS, whole, strict=True)]
    ends = [generated[0][3], generated[3][6]]
    model.generation_config.eos_token_id = ends
    cut = record(model, max_new_tokens=12, batch_size=batch_size)
    stopped_early = 0
    for prompt, tokens, before, after in zip(PROMPTS, generated, whole, cut, strict=True):
        found = [index for index, token in enumerate(tokens) if token in ends]
        kept = len(prompt) + (found[0] if found else len(tokens))
        stopped_early += bool(found)
        assert len(after.experts) == kept  # the end token itself is never fed
        np.testing.assert_array_equal(after.experts, before.experts[:kept])
    assert 2 <= stopped_early < len(PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_routes_by_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.get_submodule(find_moe_layers(model)[1].name.rpartition(".")[0]).gate.weight.fill_(value)
    with pytest.raises(ModelError, match=r"of prompt 0 by \[nan, nan\], expected finite numbers; try dtype=float32"):
        record(model)


def test_sampling_follows_the_seed() -> None:
    model = tiny_model("qwen3_moe")
    first, again, other = (record(model, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert_same(first, again)
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(first, other, strict=True))


def test_the_settings_shipped_with_a_model_do_not_change_what_sampling_means() -> None:
    model = tiny_model("qwen3_moe")
    plain = record(model, temperature=1.0)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, num_beams=2)
    assert_same(record(model, temperature=1.0), plain)


def test_hooks_are_gone_after_recording_even_when_it_is_abandoned() -> None:
    model = tiny_model("mixtral")
    routes = record_routes(model, PROMPTS, batch_size=1, max_new_tokens=2)
    next(routes)
    assert any(module._forward_pre_hooks for module in model.modules())
    routes.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_routes_follow_the_experts_implementation_whichever_it_is() -> None:
    model = tiny_model("qwen3_moe")
    expected = record(model)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        for a, b in zip(record(model), expected, strict=True):
            np.testing.assert_array_equal(a.experts, b.experts)


def test_compilation_that_a_model_asks_for_is_off_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("mixtral")
    expected = record(model)
    assert not caplog.records
    model.generation_config.cache_implementation = "static"
    assert_same(record(model), expected)
    [message] = [entry.getMessage() for entry in caplog.records if entry.name == "profiler.recorder"]
    assert "ask for a static cache" in message
    assert "eagerly and not under CUDA graphs" in message


def test_weights_fall_and_equal_ones_keep_the_order_of_the_router() -> None:
    [layer, *_] = find_moe_layers(tiny_model("mixtral"))
    indices = torch.tensor([[3, 1], [4, 2], [7, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.6, 0.4]])
    with RouteRecorder([layer]) as recorder:
        layer.experts(torch.zeros(3, 32), indices, weights)
        layer.experts(torch.zeros(3, 32), top_k_index=indices.flip(0), top_k_weights=weights.flip(0))
    experts, kept = recorder.take(3, 2)
    assert experts[:, 0, 0].tolist() == [[3, 1], [2, 4], [7, 0]]
    assert experts[:, 1, 0].tolist() == [[7, 0], [2, 4], [3, 1]]
    np.testing.assert_allclose(kept[:, 0, 0], [[0.5, 0.5], [0.8, 0.2], [0.6, 0.4]], atol=1e-3)


def test_calls_that_a_trace_cannot_hold_are_refused() -> None:
    [layer, *_] = find_moe_layers(tiny_model("mixtral"))
    hidden = torch.zeros(4, 32)
    with RouteRecorder([layer]) as recorder:
        with pytest.raises(ModelError, match=r"called with indices \[4, 3\] and weights \[4, 3\]"):
            layer.experts(hidden, torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
        with pytest.raises(ModelError, match=r"expected \[tokens, 2\]"):
            layer.experts(hidden, torch.zeros(4, 2), torch.zeros(4, 2))
        layer.experts(hidden, torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2))
    with pytest.raises(ModelError, match="saw 4 tokens, expected 2 x 3"):
        recorder.take(2, 3)
