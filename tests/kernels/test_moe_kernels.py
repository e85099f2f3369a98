"""The MoE kernels against their references: in Triton's interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support import moe_cases
from tests.support.triton_compile import in_compiler, in_interpreter

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_routes_in_interpreter() -> None:
    in_interpreter(
        """
        from tests.support.moe_cases import RULES, check_route
        for rule in RULES:
            check_route("cpu", rule, 5, 16, 3)
        check_route("cpu", "plain", 0, 8, 2)
        check_route("cpu", "renormalised", 1, 5, 2)
        """
    )


def test_permutation_in_interpreter() -> None:
    in_interpreter(
        """
        from unittest import mock
        from tests.support.moe_cases import check_permute
        for kind in ("random", "hot", "foreign"):
            check_permute("cpu", kind, 7, 3, 5)
        check_permute("cpu", "random", 0, 3, 5)
        with mock.patch("kernels.permute.kernel.LARGEST_BLOCK", 32):  # several blocks
            check_permute("cpu", "foreign", 30, 3, 6)
        """
    )


def test_products_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.grouped_gemm.tiles import Tiles
        from tests.support.moe_cases import check_products
        tiles = Tiles(rows=16, columns=32, depth=64, warps=4, stages=2, group=2)
        check_products("cpu", torch.float32, "hot", (21, 2, 4, 72, 40), tiles=tiles)
        check_products("cpu", torch.float32, "foreign", (5, 2, 4, 64, 40), "gpt_oss", tiles)
        check_products("cpu", torch.float16, "random", (3, 3, 6, 64, 64), tiles=tiles)
        check_products("cpu", torch.float32, "foreign", (5, 2, 4, 72, 40), "gpt_oss", tiles._replace(bulk=True))
        check_products("cpu", torch.float16, "random", (0, 2, 4, 64, 40), tiles=tiles)
        """
    )


def test_products_of_few_pairs_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.grouped_gemm.tiles import Lines, choose_lines
        from tests.support.moe_cases import check_products
        assert choose_lines(64, 128, 2048, True) and not choose_lines(65, 128, 2048, True)
        assert choose_lines(2, 8, 4096, True) and not choose_lines(2, 8, 14336, False)
        lines = Lines(columns=4, depth=16, warps=4)
        check_products("cpu", torch.float32, "hot", (5, 2, 4, 72, 42), tiles=lines)
        check_products("cpu", torch.float32, "foreign", (4, 3, 5, 40, 24), "gpt_oss", lines)
        check_products("cpu", torch.float16, "random", (1, 2, 6, 64, 64))  # as they are chosen
        check_products("cpu", torch.float16, "random", (0, 2, 4, 64, 40), tiles=lines)
        """
    )


def test_combination_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from tests.support.moe_cases import check_combine
        check_combine("cpu", torch.float32, 3, 4, 40, True)
        check_combine("cpu", torch.float16, 2, 3, 128, False)
        check_combine("cpu", torch.float32, 0, 2, 16, True)
        """
    )


def test_small_kernels_compile_for_hopper() -> None:
    in_compiler(
        """
        from kernels.combine.kernel import combine_kernel
        from kernels.permute.kernel import permute_kernel
        from kernels.route.kernel import route_kernel
        from kernels.route_permute.kernel import route_permute_kernel
        from tests.support.triton_compile import compile_for_sm90

        names = "num_tokens num_experts num_slots num_pairs row_stride width"
        scalars = dict.fromkeys(names.split(), "i32") | {"scale": "fp32", "eps": "fp32"}
        pointers = dict.fromkeys("ids slots order indptr slot_of_expert".split(), "*i32")
        pointers |= {"weights": "*fp32", "bias": "*fp32"}
        wide = "logits pairs shared residual norm_weight total normed".split()

        def build(kernel, dtype, constants, warps):
            types = scalars | pointers | dict.fromkeys(wide, dtype)
            signature = {n: types[n] for n in kernel.arg_names if n in types and n not in constants}
            return compile_for_sm90(kernel, signature, constants | {"OVERLAP": True}, num_warps=warps)

        rule = {"TOP_K": 8, "RENORMALISE": True, "BLOCK_K": 8, "TOP_GROUPS": 4}
        softmax = rule | {"SIGMOID": False, "GROUPS": 1, "TOP2": False, "BLOCK_E": 128, "bias": None}
        sigmoid = rule | {"SIGMOID": True, "GROUPS": 8, "TOP2": True, "BLOCK_E": 256}
        for constants in (softmax, sigmoid):
            build(route_kernel, "*bf16", constants, 1)
        build(route_permute_kernel, "*bf16", softmax | {"BLOCK_T": 8, "BLOCK_P": 256}, 4)
        build(permute_kernel, "*bf16", {"BLOCK": 2048}, 8)
        for dtype in ("*bf16", "*fp32"):
            build(combine_kernel, dtype, {"TOP_K": 8, "BLOCK_D": 2048}, 8)
        """
    )


def test_products_of_few_pairs_compile_for_hopper() -> None:
    in_compiler(
        """
        from kernels.grouped_gemm.pairs import pair_kernel
        from kernels.grouped_gemm.tiles import choose_lines
        from tests.support.triton_compile import compile_for_sm90
        for depth, activation, dtype in ((2880, "gpt_oss", "*bf16"), (768, "none", "*fp16")):
            lines = choose_lines(4, 32, depth, activation != "none")
            constants = {"D": depth, "TOP_K": 4, "ACTIVATION": activation, "BLOCK_P": 32, "OVERLAP": True}
            constants |= {"COLUMNS": lines.columns, "DEPTH": lines.depth}
            types = dict.fromkeys(("x", "weight", "bias", "out"), dtype) | {"order": "*i32", "indptr": "*i32"}
            types |= {"num_slots": "i32", "num_columns": "i32"}
            kernel = compile_for_sm90(pair_kernel, types, constants, num_warps=lines.warps)
            assert "griddepcontrol.wait" in kernel.asm["ptx"]
        """
    )


def test_products_compile_for_hopper() -> None:
    in_compiler(
        """
        from kernels.grouped_gemm.kernel import product_kernel
        from kernels.grouped_gemm.tiles import choose_tiles
        from tests.support.triton_compile import compile_for_sm90

        def build(dtype, item_bytes, num_pairs, activation, bias):
            tiles = choose_tiles(num_pairs, 32, 2880, 2880, activation != "none", item_bytes)
            constants = {"TOP_K": 4, "ACTIVATION": activation, "EVEN": 2880 % tiles.depth == 0, "BLOCK_P": 32}
            constants["BULK"] = tiles.bulk
            constants |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "OVERLAP": True}
            signature = dict.fromkeys(("x", "weight", "bias", "out"), dtype) | {"order": "*i32", "indptr": "*i32"}
            signature |= dict.fromkeys(("num_slots", "num_columns", "num_depth", "group"), "i32")
            if tiles.bulk:
                signature["weight"] = f"tensordesc<bf16[{tiles.columns}, {tiles.depth}]>"
            if not bias:
                constants["bias"] = None
                del signature["bias"]
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
            built = compile_for_sm90(product_kernel, signature, constants, **options)
            assert built.metadata.shared <= 227 * 1024
            assert dtype == "*fp32" or "mma" in built.asm["ptx"]
            assert ("cp.async.bulk.tensor" in built.asm["ptx"]) == tiles.bulk

        build("*bf16", 2, 4, "gpt_oss", True)
        build("*bf16", 2, 16, "none", True)
        build("*bf16", 2, 8192, "none", False)
        build("*fp16", 2, 2048, "silu", False)
        build("*fp32", 4, 64, "silu", False)
        """
    )


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("rule", moe_cases.RULES)
def test_routes_on_gpu(rule: str) -> None:
    for tokens, experts, top_k in ((0, 128, 8), (1, 128, 8), (7, 32, 4), (32, 128, 8), (85, 160, 3)):
        moe_cases.check_route("cuda", rule, tokens, experts, top_k)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "hot", "foreign"])
def test_permutation_on_gpu(kind: str) -> None:
    for tokens, top_k, num_slots in ((0, 8, 128), (1, 8, 128), (33, 2, 8), (300, 8, 96), (4096, 4, 32)):
        moe_cases.check_permute("cuda", kind, tokens, top_k, num_slots)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["random", "hot", "foreign"])
@pytest.mark.parametrize("activation", ["silu", "gpt_oss"])
def test_products_on_gpu(dtype: torch.dtype, kind: str, activation: str) -> None:
    for sizes in (
        (0, 2, 4, 64, 40),
        (1, 8, 32, 256, 96),
        (45, 2, 8, 200, 328),
        (300, 4, 8, 256, 384),
        (600, 4, 8, 100, 20),
    ):
        moe_cases.check_products("cuda", dtype, kind, sizes, activation)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_combination_on_gpu(dtype: torch.dtype) -> None:
    for tokens, top_k, width in ((0, 2, 64), (1, 8, 2048), (9, 4, 2880), (300, 1, 40)):
        for with_shared in (True, False):
            moe_cases.check_combine("cuda", dtype, tokens, top_k, width, with_shared)
