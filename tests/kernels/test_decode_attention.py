"""Decode attention over pages against PyTorch's attention over each sequence's own keys and values."""

from __future__ import annotations

import pytest
import torch

from kernels.decode_attention import decode_attention
from kernels.errors import OperatorError
from kernels.mla_attention import mla_attention
from tests.support.paged_caches import paged_cache

LENGTHS = [9, 0, 1, 16, 30]


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence's attention in float64: ``q`` [H, d], ``keys`` and ``values`` [n, G, d]; returns [H, d]."""
    repeats = q.shape[0] // keys.shape[1]
    keys = keys.double().repeat_interleave(repeats, dim=1).transpose(0, 1)
    values = values.double().repeat_interleave(repeats, dim=1).transpose(0, 1)
    if sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q[:, None].double(), keys, values, scale=scale)[:, 0]
    weights = (keys @ q.double()[..., None])[..., 0].mul(scale).exp()
    return (weights[..., None] * values).sum(1) / (weights.sum(1) + sinks.double().exp())[:, None]


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_equal_to_attention_of_each_sequence(with_sinks: bool, window: int | None) -> None:
    torch.manual_seed(0)
    q, sinks = torch.randn(5, 4, 8), torch.randn(4) if with_sinks else None
    keys, values = torch.randn(5, 30, 2, 8), torch.randn(5, 30, 2, 8)
    k_cache, v_cache, page_table = paged_cache((keys, values), LENGTHS, page_size=4, extra_pages=2)
    found = decode_attention(q, k_cache, v_cache, page_table, torch.tensor(LENGTHS), 0.3, window, sinks)
    for row, length in enumerate(LENGTHS):
        seen = slice(0 if window is None else max(0, length - window), length)
        expected = attend(q[row], keys[row, seen], values[row, seen], 0.3, sinks) if length else torch.zeros(4, 8)
        torch.testing.assert_close(found[row], expected.float(), atol=1e-6, rtol=1e-5)


def test_no_sequences_and_only_padding() -> None:
    keys = torch.randn(2, 3, 2, 8)
    k_cache, v_cache, page_table = paged_cache((keys, keys), [0, 0], page_size=4, extra_pages=1)
    lengths = torch.zeros(2, dtype=torch.int32)
    assert not decode_attention(torch.randn(2, 4, 8), k_cache, v_cache, page_table, lengths, 1.0).any()
    assert decode_attention(torch.randn(0, 4, 8), k_cache, v_cache, page_table[:0], lengths[:0], 1.0).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("heads", "size", "dtype", "window"),
    [(3, 8, torch.float32, None), (4, 16, torch.float32, None), (4, 8, torch.float16, None), (4, 8, torch.float32, 0)],
)
def test_what_does_not_fit_is_refused(heads: int, size: int, dtype: torch.dtype, window: int | None) -> None:
    caches = torch.zeros(2, 1, 4, 2, 8)
    page_table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(OperatorError):
        decode_attention(torch.zeros(1, heads, size, dtype=dtype), *caches, page_table, lengths, 1.0, window)


def test_latent_attention_is_attention_with_one_shared_head() -> None:
    torch.manual_seed(0)
    q, latent = torch.randn(5, 4, 24), torch.randn(5, 30, 1, 24)
    cache, _, page_table = paged_cache((latent, latent), LENGTHS, page_size=4, extra_pages=0)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    found = mla_attention(q[..., :16], q[..., 16:], cache[:, :, 0], page_table, lengths, 0.2)
    for row, length in enumerate(LENGTHS):
        seen = latent[row, :length]
        expected = attend(q[row], seen, seen, 0.2, None)[:, :16] if length else torch.zeros(4, 16)
        torch.testing.assert_close(found[row], expected.float(), atol=1e-6, rtol=1e-5)
