"""Query/key norms, rotary positions and cache writes against Transformers' own functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.mla_cache import mla_cache
from kernels.rope_cache import rope_cache

POSITIONS = 64


def angles(rotated: int) -> torch.Tensor:
    """Angle of every position and pair, float32 ``[POSITIONS, rotated / 2]``."""
    return torch.arange(POSITIONS)[:, None] / 10000.0 ** (torch.arange(0, rotated, 2) / rotated)


def table(rotated: int, factor: float = 1.0) -> torch.Tensor:
    """Cosines and sines times a factor (YaRN scales them), float32 ``[POSITIONS, 2, rotated / 2]``."""
    return torch.stack((angles(rotated).cos(), angles(rotated).sin()), dim=1) * factor


def caches(head_size: int, num_kv_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of 3 pages of 4 tokens, filled with NaN."""
    return torch.full((2, 3, 4, num_kv_heads, head_size), torch.nan).unbind(0)


def project(tokens: int, head_size: int, num_heads: int = 4, num_kv_heads: int = 2) -> torch.Tensor:
    """Seeded projections ``[T, (H + 2 G) d]``."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_size, generator=generator)


@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("norm", [None, "head", "projection"])
def test_equal_to_transformers(norm: str | None, rotated: int) -> None:
    qkv, positions = project(3, 16), torch.tensor([5, 0, 63], dtype=torch.int32)
    k_cache, v_cache = caches(16)
    sizes = {None: None, "head": (16, 16), "projection": (64, 32)}[norm]
    q_norm, k_norm = (None, None) if sizes is None else (torch.rand(sizes[0]) + 0.5, torch.rand(sizes[1]) + 0.5)
    slots = torch.tensor([2, 11, 4])
    found = rope_cache(
        qkv, positions, table(rotated, 1.25), k_cache, v_cache, slots, q_norm=q_norm, k_norm=k_norm, eps=1e-5
    )
    queries, keys, values = qkv.split((64, 32, 32), dim=1)
    if q_norm is not None and k_norm is not None:
        queries = torch.nn.functional.rms_norm(queries.view(3, -1, len(q_norm)), (len(q_norm),), q_norm, 1e-5)
        keys = torch.nn.functional.rms_norm(keys.view(3, -1, len(k_norm)), (len(k_norm),), k_norm, 1e-5)
    queries, keys = queries.reshape(1, 3, 4, 16), keys.reshape(1, 3, 2, 16)
    angle = angles(rotated)[positions.long()].repeat(1, 2)[None]
    q_turned, k_turned = apply_rotary_pos_emb(
        queries[..., :rotated], keys[..., :rotated], angle.cos() * 1.25, angle.sin() * 1.25, unsqueeze_dim=2
    )
    torch.testing.assert_close(found, torch.cat((q_turned, queries[..., rotated:]), -1)[0])
    torch.testing.assert_close(k_cache.flatten(0, 1)[slots], torch.cat((k_turned, keys[..., rotated:]), -1)[0])
    torch.testing.assert_close(v_cache.flatten(0, 1)[slots], values.view(3, 2, 16))


def test_interleaved_pairs_as_complex_numbers() -> None:
    qkv, positions = project(2, 8), torch.tensor([7, 30])
    k_cache, v_cache = caches(8)
    found = rope_cache(qkv, positions, table(8), k_cache, v_cache, torch.tensor([0, 1]), interleaved=True)
    frequencies = torch.polar(torch.ones(2, 4), angles(8)[positions])[None]
    heads = qkv[:, :48].view(1, 2, 6, 8).transpose(1, 2)
    queries, keys = apply_rotary_emb(heads[:, :4], heads[:, 4:], frequencies)
    torch.testing.assert_close(found, queries[0].transpose(0, 1))
    torch.testing.assert_close(k_cache[0, :2], keys[0].transpose(0, 1))


def test_padding_rows_store_nothing() -> None:
    k_cache, v_cache = caches(8)
    slots = torch.tensor([-1, 9, -1])
    rope_cache(project(3, 8), torch.tensor([0, 3, 0]), table(8), k_cache, v_cache, slots)
    for cache in (k_cache, v_cache):
        written = ~cache.flatten(0, 1).isnan()
        assert written[9].all()
        assert written.sum() == 2 * 8


def test_no_tokens() -> None:
    k_cache, v_cache = caches(8)
    nothing = torch.empty(0, dtype=torch.int64)
    assert rope_cache(project(0, 8), nothing, table(8), k_cache, v_cache, nothing).shape == (0, 4, 8)
    assert k_cache.isnan().all()


def test_latent_cache_holds_the_norm_and_the_rotated_key() -> None:
    torch.manual_seed(0)
    q, latent, positions = torch.randn(3, 2, 24), torch.randn(3, 40), torch.tensor([9, 2, 50])
    cache, norm, slots = torch.full((3, 4, 40), torch.nan), torch.rand(32) + 0.5, torch.tensor([3, -1, 8])
    frequencies = torch.polar(torch.ones(3, 4), angles(8)[positions])[None]
    queries, key = apply_rotary_emb(
        q[None, ..., 16:].transpose(1, 2), latent[None, None, :, 32:].contiguous(), frequencies
    )
    expected_q = torch.cat((q[..., :16], queries[0].transpose(0, 1)), dim=-1)
    mla_cache(q[..., 16:], latent, positions, table(8), cache, slots, norm, 1e-6)
    torch.testing.assert_close(q, expected_q)
    expected = torch.cat((torch.nn.functional.rms_norm(latent[:, :32], (32,), norm, 1e-6), key[0, 0]), dim=-1)
    stored = cache.flatten(0, 1)
    torch.testing.assert_close(stored[[3, 8]], expected[[0, 2]])
    assert int((~stored.isnan()).any(dim=-1).sum()) == 2
