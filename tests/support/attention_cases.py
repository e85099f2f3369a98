"""Every attention kernel against its reference, on a GPU or in Triton's interpreter; outputs start as NaN."""

from __future__ import annotations

from typing import Any

import torch

from kernels.decode_attention.kernel import decode_attention_triton
from kernels.decode_attention.reference import decode_attention_reference
from kernels.decode_attention.splits import Tiles
from kernels.mla_attention.kernel import mla_attention_triton
from kernels.mla_attention.reference import mla_attention_reference
from kernels.mla_cache.kernel import mla_cache_triton
from kernels.mla_cache.reference import mla_cache_reference
from kernels.rms_norm.kernel import add_rms_norm_triton
from kernels.rms_norm.reference import add_rms_norm_reference
from kernels.rope_cache.kernel import rope_cache_triton
from kernels.rope_cache.reference import rope_cache_reference
from kernels.sample.kernel import sample_triton
from kernels.sample.reference import sample_reference
from tests.support.moe_cases import poisoned
from tests.support.paged_caches import paged_cache

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within the dtype's tolerance, NaN where and only where NaN is expected."""
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def check_rms_norm(device: str, dtype: torch.dtype, tokens: int, width: int, add: bool = True) -> None:
    """Residual addition and norm of seeded rows."""
    torch.manual_seed(tokens)
    x, residual = torch.randn(2, tokens, width, dtype=dtype, device=device).unbind(0)
    weight = torch.randn(width, dtype=dtype, device=device)
    arguments = (x, residual if add else None, weight, 1e-5)
    with poisoned():
        found = add_rms_norm_triton(*arguments)
    expected = add_rms_norm_reference(*arguments)
    assert torch.equal(found[0], expected[0])
    assert_near(found[1], expected[1])


def check_rope_cache(
    device: str,
    dtype: torch.dtype,
    tokens: int,
    heads: tuple[int, int, int],
    rotated: int,
    norm: str | None = None,
    interleaved: bool = False,
) -> None:
    """Queries and both caches, of ``heads`` = (H, G, d); every third token is padding, and pages start as NaN."""
    torch.manual_seed(tokens)
    num_heads, num_kv_heads, size = heads
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * size, dtype=dtype, device=device)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32, device=device)
    cos_sin = torch.randn(50, 2, rotated // 2, device=device)
    slots = torch.randperm(4 * tokens, device=device)[:tokens]
    slots[::3] = -1
    shape = (max(tokens, 1), 4, num_kv_heads, size)
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(4)]
    options: dict[str, Any] = {"interleaved": interleaved}
    if norm is not None:
        widths = (size, size) if norm == "head" else (num_heads * size, num_kv_heads * size)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            options[name] = torch.rand(width, device=device).to(dtype) + 0.5
    with poisoned():
        found = rope_cache_triton(qkv, positions, cos_sin, *caches[:2], slots, **options)
    expected = rope_cache_reference(qkv, positions, cos_sin, *caches[2:], slots, **options)
    assert_near(found, expected)
    for written, wanted in zip(caches[:2], caches[2:], strict=True):
        assert_near(written, wanted)


def check_decode_attention(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int, int],
    page_size: int,
    window: int | None = None,
    sinks: bool = False,
    extra_pages: int = 1,
    tiles: Tiles | None = None,
) -> None:
    """Attention with ``heads`` = (H, G, d) over pages that are NaN where no token is; twice, to the same bits."""
    torch.manual_seed(len(lengths))
    num_heads, num_kv_heads, size = heads
    longest = max([*lengths, 1])
    dense = torch.randn(2, len(lengths), longest, num_kv_heads, size, dtype=dtype)
    k_cache, v_cache, page_table = paged_cache((dense[0], dense[1]), lengths, page_size, extra_pages)
    q = torch.randn(len(lengths), num_heads, size, dtype=dtype)
    inputs = [x.to(device) for x in (q, k_cache, v_cache, page_table, torch.tensor(lengths, dtype=torch.int32))]
    sink = torch.randn(num_heads, device=device) * 3 if sinks else None
    with poisoned():
        found = decode_attention_triton(*inputs, size**-0.5, window, sink, tiles=tiles)
        again = decode_attention_triton(*inputs, size**-0.5, window, sink, tiles=tiles)
    assert torch.equal(found, again)
    assert_near(found, decode_attention_reference(*inputs, size**-0.5, window, sink))


def check_mla(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    sizes: tuple[int, int, int],
    page_size: int,
    extra_pages: int = 1,
    tiles: Tiles | None = None,
) -> None:
    """Latent attention and cache writes of ``sizes`` = (H, C, r); pages are NaN where no token is."""
    torch.manual_seed(len(lengths))
    (num_heads, latent_size, rotated), batch = sizes, len(lengths)
    dense = torch.randn(batch, max([*lengths, 1]), latent_size + rotated, dtype=dtype)
    cache, _, page_table = paged_cache((dense, dense), lengths, page_size, extra_pages)
    q = torch.randn(batch, num_heads, latent_size + rotated, dtype=dtype, device=device)
    inputs = [q[..., :latent_size], q[..., latent_size:], cache.to(device), page_table.to(device)]
    arguments = (*inputs, torch.tensor(lengths, dtype=torch.int32, device=device), 0.1)
    with poisoned():
        found = mla_attention_triton(*arguments, tiles=tiles)
    assert_near(found, mla_attention_reference(*arguments))
    latent = torch.randn(batch, latent_size + rotated, dtype=dtype, device=device)
    positions, cos_sin = torch.arange(batch, device=device), torch.randn(batch, 2, rotated // 2, device=device)
    slots, norm = torch.arange(batch, device=device) * 3, torch.rand(latent_size, device=device).to(dtype)
    slots[1::2] = -1
    for interleaved in (True, False):
        caches = [torch.full((batch, 4, *latent.shape[1:]), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        queries = [q.clone(), q.clone()]  # whose last r entries are rotated in place
        for op, own, stored in zip((mla_cache_triton, mla_cache_reference), queries, caches, strict=True):
            turned = own[..., latent_size:]
            op(turned, latent, positions, cos_sin, stored, slots, norm, 1e-6, interleaved=interleaved)
        assert_near(*queries)
        assert_near(*caches)


def check_sample(
    device: str, dtype: torch.dtype, batch: int, vocabulary: int, top_p: bool = True, allowed: int | None = None
) -> None:
    """The tokens of mixed settings; logits are coarse, so that many are equal, and all but so many are ruled out."""
    torch.manual_seed(batch)
    logits = (torch.randn(batch, vocabulary, device=device) * 6).round().div(2).to(dtype)
    if allowed is not None:
        ruled_out = torch.rand(batch, vocabulary, device=device).argsort(dim=1)[:, allowed:]
        logits.scatter_(1, ruled_out, -torch.inf)
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5, 1e-30], device=device).repeat(batch)[:batch]
    seeds = torch.randint(-(2**62), 2**62, (batch,), device=device)
    positions = torch.arange(batch, dtype=torch.int32, device=device) * 77
    nucleus = torch.tensor([0.9, 1.0, 0.2, 0.95, 0.0, 0.6, 0.999], device=device).repeat(batch)[:batch]
    arguments = (logits, temperature, seeds, positions, nucleus if top_p else None)
    with poisoned():
        found = sample_triton(*arguments)
    assert found.dtype == torch.int64
    assert found.tolist() == sample_reference(*arguments).tolist()
