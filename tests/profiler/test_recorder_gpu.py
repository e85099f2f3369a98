"""Recording on a GPU: the same routes as on the CPU, whenever they are moved to the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from profiler import route_buffer
from profiler.recorder import generate_batch, record_routes
from tests.support.tiny_models import VOCAB_SIZE, tiny_model

PROMPTS = [np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist() for length in (9, 1, 4, 12)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("most_waiting_bytes", [0, 1 << 25])
def test_routes_equal_those_of_the_cpu(family: str, most_waiting_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_buffer, "MOST_WAITING_BYTES", most_waiting_bytes)
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    settings = {"batch_size": 4, "max_new_tokens": 6, "gate_ahead": True}
    expected = list(record_routes(model, PROMPTS, **settings))
    model.to("cuda")
    unrecorded = generate_batch(model, PROMPTS, max_new_tokens=6)
    padded_prompt = max(len(prompt) for prompt in PROMPTS)
    for row, (a, b) in enumerate(zip(record_routes(model, PROMPTS, **settings), expected, strict=True)):
        for name in ("experts", "gate_ahead", "token_ids", "decode"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.weights.astype(np.float32), b.weights.astype(np.float32), atol=2e-3)
        first = padded_prompt - len(PROMPTS[row])
        np.testing.assert_array_equal(a.token_ids, unrecorded[row, first : first + len(a.token_ids)])
