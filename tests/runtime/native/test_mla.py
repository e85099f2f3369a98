"""Latent attention: heads expanded a few at a time, and never expanded while decoding, give the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from runtime.native import mla
from runtime.native.mla import attend_prompts, attend_rows
from runtime.native.model import NativeModel
from tests.support.native import native_model

LENGTHS = (33, 16, 1)
PAGE = 16


@pytest.fixture(scope="module")
def model(saved_model: Callable[[str], str]) -> NativeModel:
    return native_model(saved_model("deepseek_v2"))


def draw(model: NativeModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query per row, a cache that is NaN where no row has a token, and the rows' pages."""
    shape = model.decoder.shape
    assert shape.latent is not None
    torch.manual_seed(0)
    cache = torch.full((12, PAGE, shape.latent.entry), torch.nan)
    page_table = torch.randperm(12)[:9].view(3, 3)
    for pages, length in zip(page_table, LENGTHS, strict=True):
        index = torch.arange(length)
        cache[pages[index // PAGE], index % PAGE] = torch.randn(length, shape.latent.entry)
    return torch.randn(3, shape.num_heads, shape.head_size), cache, page_table


def test_decoding_is_a_prompt_of_one_token(model: NativeModel) -> None:
    shape, layer = model.decoder.shape, model.decoder.weights.layers[1]
    q, cache, page_table = draw(model)
    found = attend_rows(shape, layer, q, cache, page_table.int(), torch.tensor(LENGTHS, dtype=torch.int32))
    for row, length in enumerate(LENGTHS):
        entries = cache[page_table[row]].flatten(0, 1)[:length]
        expected = attend_prompts(shape, layer, q[row][None, None], entries[None])
        torch.testing.assert_close(found[row], expected[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 5, 33])
def test_heads_are_expanded_within_bounds(new: int, model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, layer = model.decoder.shape, model.decoder.weights.layers[1]
    assert shape.latent is not None
    q, entries = torch.randn(2, new, shape.num_heads, shape.head_size), torch.randn(2, 33, shape.latent.entry)
    whole = attend_prompts(shape, layer, q, entries)
    assert whole.shape == (2, new, shape.num_heads, shape.latent.value_size)
    sizes = []
    attend = mla.prefill_attention

    def count(queries: torch.Tensor, keys: torch.Tensor, *others: object) -> torch.Tensor:
        sizes.append(keys.shape[2])
        return attend(queries, keys, *others)

    monkeypatch.setattr(mla, "prefill_attention", count)
    monkeypatch.setattr(mla, "EXPANDED", 3 * 2 * 33 * (shape.head_size + shape.latent.value_size))
    torch.testing.assert_close(attend_prompts(shape, layer, q, entries), whole)
    assert sizes == [3, 1]
