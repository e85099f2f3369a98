"""Attention kernels of published models' shapes against the card's copy rate, Transformers and PyTorch.

    python -m benchmarks.kernels_attention -o benchmarks/results/kernels_attention.json

Every time is taken in a CUDA graph that goes through several layers' caches, so that L2 cannot hold them; a graph also
spares the other engines the launches that they pay for in an eager step. Engines of `decode_attention`: `transformers`
is what Transformers runs by default in a decode step, its dynamic cache growing by one token included (the window's
cache apart); `transformers_attention` the attention function of that alone (SDPA, or gpt-oss's own); `sdpa_flash`
PyTorch's flash kernel with the query heads of a group as rows of one head; `flex` compiled `flex_attention`. Bytes
count keys and values once. DeepSeek-V2-Lite is `mla_attention` against Transformers' expanded keys and values.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.graph_timing import copy_bytes_per_us, time_us
from kernels.decode_attention import decode_attention
from kernels.mla_attention import mla_attention
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from kernels.rope_cache import rope_cache
from kernels.sample import sample, sample_reference
from placement import provenance

CONTEXTS, BATCHES = (200, 1024, 4096, 8192, 16384, 32768), (1, 4, 16, 64)
SMALL_BATCHES = (1, 16, 64, 256)
SETS_BYTES = 300e6  # of caches in a graph, several times L2
MOST_SETS = 48
PAGE = 64
BFLOAT16 = torch.bfloat16
Calls = list[Callable[[], object]]


@dataclass(frozen=True)
class Shape:
    """Query heads H, key/value heads G, head size d, and what gpt-oss adds."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    window: int | None = None
    sinks: bool = False


SHAPES = (
    Shape("Qwen3-30B-A3B", 32, 4, 128),
    Shape("Mixtral-8x7B", 32, 8, 128),
    Shape("gpt-oss-20b", 64, 8, 64, sinks=True),
    Shape("gpt-oss-20b, window 128", 64, 8, 64, window=128, sinks=True),
)


def draw(*shape: int) -> torch.Tensor:
    """Random bfloat16 numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=BFLOAT16)


def native_calls(shape: Shape, batch: int, context: int, sets: int) -> Calls:
    """`decode_attention` on pages in random order; the table has room for exactly this context."""
    columns = -(-context // PAGE)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    sinks = draw(shape.num_heads) if shape.sinks else None
    calls: Calls = []
    for _ in range(sets):
        q = draw(batch, shape.num_heads, shape.head_size)
        keys, values = draw(2, batch * columns, PAGE, shape.num_kv_heads, shape.head_size)
        table = torch.randperm(batch * columns, device="cuda").int().view(batch, columns)
        scale = shape.head_size**-0.5
        calls.append(functools.partial(decode_attention, q, keys, values, table, lengths, scale, shape.window, sinks))
    return calls


def library_calls(shape: Shape, batch: int, context: int, sets: int, with_flex: bool) -> Iterator[tuple[str, Calls]]:
    """What runs instead on dense caches ``[B, G, N, d]``; a sliding layer's cache holds the window alone."""
    from transformers.cache_utils import DynamicLayer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    held, scale = min(context, shape.window or context), shape.head_size**-0.5
    per_group = shape.num_heads // shape.num_kv_heads
    module = SimpleNamespace(num_key_value_groups=per_group, is_causal=True, training=False)
    module.sinks = draw(shape.num_heads)
    forward = cast(Any, eager_attention_forward if shape.sinks else sdpa_attention_forward)
    inputs = []
    for _ in range(sets):
        q = draw(batch, shape.num_heads, 1, shape.head_size)
        inputs.append((q, *draw(2, batch, shape.num_kv_heads, held, shape.head_size).unbind(0)))
    new = draw(batch, shape.num_kv_heads, 1, shape.head_size)

    def grown(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> object:
        layer = DynamicLayer()
        layer.lazy_initialization(new, new)
        layer.is_initialized, layer.keys, layer.values = True, keys, values
        return forward(module, q, *layer.update(new, new), None, scaling=scale)

    def flash(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> object:
        rows = q.view(batch, shape.num_kv_heads, per_group, shape.head_size)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(rows, keys, values, scale=scale)

    yield "transformers_attention", [functools.partial(forward, module, *a, None, scaling=scale) for a in inputs]
    if shape.window is None:
        yield "transformers", [functools.partial(grown, *a) for a in inputs]
    if not shape.sinks:
        yield "sdpa_flash", [functools.partial(flash, *a) for a in inputs]
        if with_flex:
            from torch.nn.attention.flex_attention import flex_attention

            torch.compiler.reset()
            flex = torch.compile(flex_attention, dynamic=False)
            yield "flex", [functools.partial(cast(Any, flex), *a, scale=scale, enable_gqa=True) for a in inputs]


def attention_rows(shape: Shape, batch: int, context: int, rate: float, with_flex: bool) -> list[dict[str, Any]]:
    """All engines at one batch and context."""
    reach = min(context, shape.window or context)
    num_bytes = 2 * batch * reach * shape.num_kv_heads * shape.head_size * BFLOAT16.itemsize
    sets = max(1, min(MOST_SETS, int(SETS_BYTES / num_bytes) + 1))
    common = {"op": "decode_attention", "shape": shape.name, "gpus": 1, "batch": batch, "context": context}
    common |= {"dtype": "bfloat16", "repeats": sets, "kv_bytes": num_bytes}
    times = {"expertplan": time_us(native_calls(shape, batch, context, sets))}
    for engine, calls in library_calls(shape, batch, context, sets, with_flex):
        times[engine] = time_us(calls)
        del calls
        torch.cuda.empty_cache()
    share = num_bytes / times["expertplan"] / rate
    print(shape.name, batch, context, f"{share:.0%}", *(f"{k} {v:.1f}us" for k, v in times.items()), flush=True)
    return [
        {"engine": engine, **common, "time_us": took, "share_of_copy_rate": num_bytes / took / rate}
        for engine, took in times.items()
    ]


def latent_rows(batch: int, context: int, rate: float) -> list[dict[str, Any]]:
    """DeepSeek-V2-Lite: 16 heads, latent vectors of 512, rotated keys of 64; expanded keys of 192, values of 128."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    columns, num_bytes = -(-context // PAGE), 2 * batch * context * 576
    sets = max(1, min(MOST_SETS, int(SETS_BYTES / num_bytes) + 1))
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    native, expanded = [], []
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=False)
    for _ in range(sets):
        table = torch.randperm(batch * columns, device="cuda").int().view(batch, columns)
        cache, q = draw(batch * columns, PAGE, 576), draw(batch, 16, 576)
        native.append(functools.partial(mla_attention, q[..., :512], q[..., 512:], cache, table, lengths, 0.1))
        wide = draw(2, batch, 16, context, 192).unbind(0)
        arguments = (module, draw(batch, 16, 1, 192), wide[0], wide[1][..., :128].contiguous(), None)
        expanded.append(functools.partial(cast(Any, sdpa_attention_forward), *arguments, scaling=0.1))
    times = {"expertplan": time_us(native), "transformers_attention": time_us(expanded)}
    common = {"op": "mla_attention", "shape": "DeepSeek-V2-Lite", "gpus": 1, "batch": batch, "context": context}
    common |= {"dtype": "bfloat16", "repeats": sets, "kv_bytes": num_bytes}
    share = num_bytes / times["expertplan"] / rate
    print("DeepSeek-V2-Lite", batch, context, f"{share:.0%}", *(f"{k} {v:.1f}us" for k, v in times.items()), flush=True)
    return [{"engine": engine, **common, "time_us": took} for engine, took in times.items()]


def small_calls(batch: int) -> Iterator[tuple[str, str, int, Calls]]:
    """Op, engine, fewest bytes and calls of the small kernels, in Qwen3-30B-A3B's shape."""
    x, residual, weight = draw(batch, 2048), draw(batch, 2048), draw(2048)
    norms: dict[str, Callable[..., object]] = {"expertplan": add_rms_norm, "torch": add_rms_norm_reference}
    for engine, op in norms.items():
        yield "rms_norm", engine, 4 * x.nbytes, [functools.partial(op, x, residual, weight, 1e-6)] * 16
    qkv, (keys, values), norm = draw(batch, 40 * 128), draw(2, batch, PAGE, 4, 128), draw(128)
    positions = torch.arange(batch, device="cuda", dtype=torch.int32)
    cos_sin, slots = torch.randn(4096, 2, 64, device="cuda"), torch.arange(batch, device="cuda") * PAGE
    rope = functools.partial(rope_cache, qkv, positions, cos_sin, keys, values, slots, q_norm=norm, k_norm=norm)
    yield "rope_cache", "expertplan", 2 * qkv.nbytes, [rope] * 16  # the reference cannot be captured
    logits, ones = draw(batch, 151_936), torch.ones(batch, device="cuda")
    seeds = torch.arange(batch, device="cuda")
    draws: dict[str, Callable[..., object]] = {"expertplan": sample, "torch": sample_reference}
    for name, heat, mass in (("greedy", 0.0, None), ("temperature", 1.0, None), ("top_p 0.9", 1.0, ones * 0.9)):
        for engine, op in draws.items():
            call = functools.partial(op, logits * 2, ones * heat, seeds, seeds, mass)
            yield f"sample, {name}", engine, logits.nbytes, [call] * 2


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument(
        "--flex", action="store_true", help="time flex_attention too, at context 8192 of the first shape"
    )
    flags = parser.parse_args()
    rate = copy_bytes_per_us()
    described = provenance.describe_run(("torch", "triton", "transformers"))
    described |= {"device": f"1x {torch.cuda.get_device_name()}", "copy_tb_per_s": rate / 1e6}
    print(described, flush=True)
    rows: list[dict[str, Any]] = []
    for batch in SMALL_BATCHES:
        for op, engine, num_bytes, calls in small_calls(batch):
            row = {"engine": engine, "op": op, "shape": "Qwen3-30B-A3B", "gpus": 1, "batch": batch}
            row |= {"dtype": "bfloat16", "repeats": len(calls), "time_us": time_us(calls), "bytes": num_bytes}
            print(op, engine, batch, f"{row['time_us']:.2f}us", flush=True)
            rows.append(row)
    contexts = tuple(map(int, flags.contexts.split(",")))
    batches = tuple(map(int, flags.batches.split(",")))
    for context in contexts:
        for batch in batches:
            if batch * context <= 2**19:  # the expanded keys and values of more do not fit beside the rest
                rows += latent_rows(batch, context, rate)
    for shape in SHAPES:
        for context in contexts:
            for batch in batches:
                with_flex = flags.flex and shape is SHAPES[0] and context == 8192 and batch in (1, 16)
                rows += attention_rows(shape, batch, context, rate, with_flex)
                Path(flags.output).write_text(json.dumps(described | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
