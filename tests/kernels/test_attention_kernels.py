"""The attention kernels against their references: in Triton's interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support.triton_compile import in_compiler, in_interpreter

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_small_kernels_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from tests.support.attention_cases import check_rms_norm, check_rope_cache, check_sample
        check_rms_norm("cpu", torch.float32, 3, 40)
        check_rms_norm("cpu", torch.float16, 2, 64, add=False)
        check_rms_norm("cpu", torch.float32, 0, 16)
        check_rope_cache("cpu", torch.float32, 4, (6, 2, 16), 16)
        check_rope_cache("cpu", torch.float16, 4, (6, 2, 16), 8, "head")
        check_rope_cache("cpu", torch.float32, 4, (5, 3, 12), 12, "projection")
        check_rope_cache("cpu", torch.float32, 4, (6, 2, 16), 8, "head", interleaved=True)
        check_rope_cache("cpu", torch.float32, 0, (6, 2, 16), 8)
        check_sample("cpu", torch.float32, 7, 300)
        check_sample("cpu", torch.float16, 7, 5000)
        check_sample("cpu", torch.float32, 3, 5000, top_p=False)
        check_sample("cpu", torch.float32, 7, 9000, allowed=3)
        check_sample("cpu", torch.float32, 0, 10)
        """
    )


def test_attention_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.decode_attention.splits import Tiles
        from tests.support.attention_cases import check_decode_attention, check_mla
        # More splits than most rows have blocks.
        many = Tiles(block=16, warps=4, stages=2, programs_per_sm=32, least=16)
        check_decode_attention("cpu", torch.float32, [70, 0, 1, 64, 200], (4, 2, 16), 16)
        check_decode_attention("cpu", torch.float16, [70, 3], (6, 2, 64), 32, window=20, sinks=True)
        check_decode_attention("cpu", torch.float32, [40, 33, 7], (4, 4, 24), 16, sinks=True, tiles=many)
        check_decode_attention("cpu", torch.float32, [130, 0, 17], (6, 1, 16), 64, window=33, tiles=many)
        check_decode_attention("cpu", torch.float32, [0, 0], (4, 2, 16), 16)
        check_decode_attention("cpu", torch.float32, [], (4, 2, 16), 16)
        check_mla("cpu", torch.float32, [70, 0, 1, 64], (3, 32, 16), 16, tiles=many)
        check_mla("cpu", torch.float16, [70, 33], (20, 64, 16), 32)
        check_mla("cpu", torch.float32, [40, 3], (40, 16, 16), 16)
        check_mla("cpu", torch.float32, [], (3, 32, 16), 16)
        """
    )


def test_small_kernels_compile_for_hopper() -> None:
    in_compiler(
        """
        from kernels.rms_norm.kernel import _add_rms_norm
        from kernels.rope_cache.kernel import _rope_cache
        from kernels.sample.kernel import _check, _name_winner, _race
        from tests.support.triton_compile import compile_for_sm90

        types = dict.fromkeys("x residual weight total normed qkv k_cache v_cache q_norm k_norm q_out logits".split())
        scalars = dict.fromkeys("V row_stride".split(), "i32") | {"eps": "fp32"}
        scalars |= {f"{c}_{n}_stride": "i32" for c in "kv" for n in ("page", "token", "head")}
        integers = {"positions": "*i32", "slot_index": "*i64", "seeds": "*i64", "tokens": "*i32"}
        integers |= {"chosen": "*i64", "next_tokens": "*i32"}
        floats = dict.fromkeys("cos_sin temperatures top_ps scores peaks checked".split(), "*fp32")

        def build(kernel, dtype, constants):
            known = dict.fromkeys(types, dtype) | scalars | integers | floats
            signature = {n: known[n] for n in kernel.arg_names if n in known}
            assert "griddepcontrol" in compile_for_sm90(kernel, signature, constants | {"OVERLAP": True}).asm["ptx"]

        heads = {"H": 32, "G": 4, "D": 128, "PAGE": 64, "BLOCK_HEADS": 8, "BLOCK_Q": 4096, "BLOCK_K": 512}
        whole = heads | {"HALF": 64, "BLOCK_HALF": 64, "BLOCK_KEPT": 1, "INTERLEAVED": False}
        part = heads | {"HALF": 32, "BLOCK_HALF": 32, "BLOCK_KEPT": 64, "INTERLEAVED": True}
        parts = {"PARTS": 38, "NO_TOKEN": 2**31 - 1, "MIN_TEMPERATURE": 1e-5}
        for dtype in ("*bf16", "*fp16", "*fp32"):
            build(_add_rms_norm, dtype, {"D": 2880, "BLOCK": 4096, "ADD": True})
            build(_rope_cache, dtype, whole | {"NORM": "head"})
            build(_rope_cache, dtype, part | {"NORM": "projection"})
            build(_race, dtype, parts | {"PART": 4096})
        build(_check, "*bf16", parts | {"PART": 4096, "BLOCK_PARTS": 64})
        build(_name_winner, "*bf16", parts | {"BLOCK_PARTS": 64, "BLOCK": 8192, "NUCLEUS": True})
        """
    )


def test_attention_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.decode_attention.kernel import _decode_attention, add_splits
        from kernels.mla_attention.kernel import _mla_attention
        from kernels.mla_cache.kernel import _mla_cache
        from tests.support.triton_compile import compile_for_sm90

        types = dict.fromkeys(("partial", "peaks", "totals"), "*fp32") | {"scale_log2": "fp32", "splits": "i32"}
        types |= dict.fromkeys(("page_table", "lengths"), "*i32")
        types |= {n: "i32" for n in _decode_attention.arg_names if n.endswith("_stride")}
        shape = {"R": 8, "ROWS": 16, "PAGE": 16, "LOG2_E": 1.44, "OVERLAP": True, "BLOCK_SPLITS": 64}
        qwen = shape | {"H": 32, "D": 128, "BLOCK_D": 128, "WINDOW": 0, "SINKS": False, "WHOLE": False, "BLOCK": 64}
        gpt_oss = shape | {"H": 64, "D": 64, "BLOCK_D": 64, "WINDOW": 128, "SINKS": True, "WHOLE": True, "BLOCK": 128}
        for dtype, constants, stages in (("*bf16", qwen, 3), ("*fp16", gpt_oss, 2), ("*fp32", qwen | {"BLOCK": 32}, 2)):
            kinds = types | dict.fromkeys(("q", "k_cache", "v_cache", "sinks", "out"), dtype)
            for kernel in (_decode_attention, add_splits):
                signature = {n: kinds[n] for n in kernel.arg_names if n in kinds}
                mine = {n: v for n, v in constants.items() if n in kernel.arg_names}
                built = compile_for_sm90(kernel, signature, mine, num_warps=4, num_stages=stages)
                assert built.metadata.shared <= 227 * 1024
                assert kernel is add_splits or dtype == "*fp32" or "mma" in built.asm["ptx"]
        types |= {n: "i32" for k in (_mla_attention, _mla_cache) for n in k.arg_names if n.endswith("_stride")}
        types |= dict.fromkeys(("q_latent", "q_rope", "cache", "latent", "norm"), "*bf16") | {"eps": "fp32"}
        types |= {"positions": "*i32", "slot_index": "*i64", "cos_sin": "*fp32"}
        latent = {"H": 16, "C": 512, "ROPE": 64, "BLOCK_H": 16, "BLOCK": 64, "PAGE": 64, "OVERLAP": True}
        latent |= {"HALF": 32, "INTERLEAVED": True, "BLOCK_C": 512, "BLOCK_HALF": 32}
        many_heads = latent | {"H": 128, "BLOCK_H": 32}
        for kernel, constants in ((_mla_attention, latent), (_mla_attention, many_heads), (_mla_cache, latent)):
            signature = {n: types[n] for n in kernel.arg_names if n in types}
            mine = {n: v for n, v in constants.items() if n in kernel.arg_names}
            built = compile_for_sm90(kernel, signature, mine, num_warps=4, num_stages=2)
            assert built.metadata.shared <= 227 * 1024
            assert kernel is _mla_cache or "wgmma" in built.asm["ptx"]
        """
    )


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_gpu(dtype: torch.dtype) -> None:
    from tests.support import attention_cases as cases

    for tokens in (0, 1, 77):
        cases.check_rms_norm("cuda", dtype, tokens, 2880)
        for norm in (None, "head", "projection"):
            cases.check_rope_cache("cuda", dtype, tokens, (32, 4, 128), 128, norm)
        cases.check_rope_cache("cuda", dtype, tokens, (64, 8, 64), 32, interleaved=True)
        cases.check_sample("cuda", dtype, tokens, 151_936)
        cases.check_sample("cuda", dtype, tokens, 151_936, allowed=40)
    lengths = [1, 0, 4000, 16, 17, 264, 999]
    for page_size in (16, 32, 64):
        cases.check_decode_attention("cuda", dtype, lengths, (32, 4, 128), page_size)
        cases.check_decode_attention("cuda", dtype, lengths[:1], (32, 8, 128), page_size, extra_pages=200)
        cases.check_decode_attention("cuda", dtype, lengths, (64, 8, 64), page_size, window=128, sinks=True)
        cases.check_mla("cuda", dtype, lengths, (16, 512, 64), page_size)
        cases.check_mla("cuda", dtype, lengths[:3], (128, 512, 64), page_size)
    cases.check_decode_attention("cuda", dtype, [20_000], (6, 2, 80), 16, sinks=True, extra_pages=500)


@GPU
@pytest.mark.gpu
def test_captured_graph_serves_other_lengths() -> None:
    from kernels.decode_attention import decode_attention, decode_attention_reference
    from tests.support.paged_caches import paged_cache

    torch.manual_seed(0)
    dense = torch.randn(2, 3, 2000, 2, 64, dtype=torch.float16)
    k_cache, v_cache, page_table = (x.cuda() for x in paged_cache((dense[0], dense[1]), [2000] * 3, 16, 4))
    q, lengths = torch.randn(3, 8, 64, dtype=torch.float16, device="cuda"), torch.ones(3, dtype=torch.int32).cuda()
    arguments = (q, k_cache, v_cache, page_table, lengths, 0.125)
    decode_attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode_attention(*arguments)
    for now in ([1, 2, 3], [2000, 0, 700], [64, 1999, 65]):
        lengths.copy_(torch.tensor(now))
        q.normal_()
        graph.replay()
        torch.testing.assert_close(found, decode_attention_reference(*arguments), atol=4e-3, rtol=4e-3)
