"""Norm and router in one launch: against the two operators, in Triton's interpreter, compiled for Hopper, on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.norm_linear import norm_linear
from kernels.rms_norm import add_rms_norm_reference
from kernels.skinny_linear import skinny_linear_reference
from tests.support.triton_compile import in_compiler, in_interpreter

SHAPES = [(1, 2048, 128), (3, 2880, 32), (8, 2048, 64), (8, 4096, 8), (9, 64, 16), (5, 40, 3)]


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_is_the_norm_and_the_linear_layer_of_it(tokens: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(tokens, 24), torch.randn(tokens, 24), torch.randn(5, 24)
    total, normed, found = norm_linear(x, residual, torch.full((24,), 2.0), 1e-5, weight, torch.ones(5))
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (24,), torch.full((24,), 2.0), 1e-5))
    torch.testing.assert_close(found, normed @ weight.T + 1)


def test_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.norm_linear.kernel import norm_linear_triton
        from kernels.rms_norm import add_rms_norm_reference
        from kernels.skinny_linear import skinny_linear_reference
        for tokens, width, outputs in ((1, 16, 5), (3, 40, 2), (8, 33, 1)):
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 4e-3)):
                x, residual = torch.randn(2, tokens, width).to(dtype)
                norm, weight, bias = torch.randn(width), torch.randn(outputs, width).to(dtype), torch.randn(outputs)
                for added in (None, bias.to(dtype)):
                    sums, normed = add_rms_norm_reference(x, residual, norm, 1e-5)
                    expected = sums, normed, skinny_linear_reference(normed, weight, added, torch.float32)
                    found = norm_linear_triton(x, residual, norm, 1e-5, weight, added, torch.float32)
                    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
        """
    )


def test_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.norm_linear.kernel import norm_linear_kernel
        from tests.support.triton_compile import compile_for_sm90
        names = ("x", "residual", "norm_weight", "weight", "bias", "total", "normed", "out")
        types = dict.fromkeys(names, "*bf16") | {"num_tokens": "i32", "eps": "fp32"}
        for tokens, width, warps in ((1, 2048, 8), (8, 4096, 16)):
            constants = dict(D=width, BLOCK_T=tokens, BLOCK_D=width, OVERLAP=True)
            kernel = compile_for_sm90(norm_linear_kernel, types, constants, num_warps=warps)
            assert "griddepcontrol.wait" in kernel.asm["ptx"]
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "outputs"), SHAPES)
def test_on_gpu(tokens: int, width: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    x, residual = torch.randn(2, tokens, width, device="cuda", dtype=dtype)
    norm, weight = torch.randn(width, device="cuda"), torch.randn(outputs, width, device="cuda", dtype=dtype)
    found = norm_linear(x, residual, norm, 1e-5, weight, None, torch.float32)
    sums, normed = add_rms_norm_reference(x.cpu(), residual.cpu(), norm.cpu(), 1e-5)
    expected = sums, normed, skinny_linear_reference(normed, weight.cpu(), None, torch.float32)
    for mine, theirs in zip(found, expected, strict=True):
        error = (mine.cpu().double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= (2e-4 if dtype == torch.float32 else 1e-2)
