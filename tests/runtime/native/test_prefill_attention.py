"""Attention of prompts: taking heads or sequences in turns changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.native import prefill as feeding
from runtime.native import prefill_attention as module
from runtime.native.prefill_attention import prefill_attention
from tests.support.native import admission, native_model, prefill


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_heads_in_turns(window: int | None, with_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 7, 6, 8), torch.randn(2, 11, 3, 8), torch.randn(2, 11, 3, 8)
    sinks = torch.randn(6) if with_sinks else None
    together = prefill_attention(q, k, v, 0.3, window, sinks)
    monkeypatch.setattr(module, "EXPANDED", 2 * k[:, :, 0].numel() * 2)  # two kv heads of two query heads each
    torch.testing.assert_close(prefill_attention(q, k, v, 0.3, window, sinks), together)
    scores = torch.einsum("nlhd,nshd->nhls", q, k.repeat_interleave(2, dim=2)) * 0.3
    visible = module.visible_tokens(4, 7, 11, window, q.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(2, 6, 7, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., :11]
    expected = torch.einsum("nhls,nshd->nlhd", weights, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2_lite"])
def test_sequences_in_turns(family: str, saved_model: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[10 * number + place for place in range(9)] for number in range(5)]
    found = []
    for at_once in (5, 2):
        model = native_model(saved_model(family), max_prefill_tokens=64)
        monkeypatch.setattr(feeding, "EXPANDED", at_once * 9 * model.decoder.shape.kv_values_per_layer)
        prefill(model, [admission(number, prompt, 1) for number, prompt in enumerate(prompts)])
        found.append(torch.cat(model.logits))
    torch.testing.assert_close(*found)
