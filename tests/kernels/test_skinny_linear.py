"""A linear layer for few tokens: reference, kernel in Triton's interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.skinny_linear import skinny_linear, skinny_linear_reference
from tests.support.triton_compile import in_compiler, in_interpreter

SHAPES = [(1, 16, 5), (3, 40, 17), (4, 33, 1), (5, 24, 6), (0, 16, 8), (2, 9000, 3)]


def make(tokens: int, width: int, rows: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((tokens, width), (rows, width), (rows,))
    return [torch.randn(size, generator=generator).to(dtype).to(device) for size in sizes]


@pytest.mark.parametrize(("tokens", "width", "rows"), SHAPES)
def test_reference(tokens: int, width: int, rows: int) -> None:
    x, weight, bias = make(tokens, width, rows, torch.bfloat16, "cpu")
    found = skinny_linear(x, weight, bias)
    assert found.dtype == torch.bfloat16
    expected = (x.double()[:, None] * weight.double()).sum(-1) + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    exact = skinny_linear(x, weight, bias, torch.float32)
    assert exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-4)


def test_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.skinny_linear.kernel import skinny_linear_triton
        from kernels.skinny_linear.reference import skinny_linear_reference
        for tokens, width, rows in ((1, 16, 5), (3, 40, 17), (4, 33, 1)):
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
                x, weight, bias = (torch.randn(size).to(dtype) for size in ((tokens, width), (rows, width), (rows,)))
                for added in (None, bias):
                    expected = skinny_linear_reference(x, weight, added)
                    torch.testing.assert_close(skinny_linear_triton(x, weight, added), expected, rtol=bound, atol=bound)
                exact = skinny_linear_reference(x, weight, None, torch.float32)
                found = skinny_linear_triton(x, weight, None, torch.float32)
                torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        """
    )


def test_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.skinny_linear.kernel import _skinny_linear
        from tests.support.triton_compile import compile_for_sm90
        for width, tokens, rows in ((2048, 1, 4), (2880, 4, 1), (4096, 2, 2)):
            constants = dict(D=width, T=tokens, ROWS=rows, BLOCK=2048 if width == 2048 else 4096)
            constants |= dict(BIAS=True, OVERLAP=True)
            types = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {"N": "i32"}
            kernel = compile_for_sm90(_skinny_linear, types, constants, num_warps=4)
            assert "griddepcontrol.wait" in kernel.asm["ptx"]
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width", "rows"), [*SHAPES, (1, 2048, 5120), (4, 4096, 2048), (2, 2048, 128)])
def test_on_gpu(tokens: int, width: int, rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = make(tokens, width, rows, dtype, "cuda")
    expected = skinny_linear_reference(x.cpu(), weight.cpu(), bias.cpu())
    bound = 2e-4 if dtype == torch.float32 else 2e-2
    found = skinny_linear(x, weight, bias).cpu().double()
    assert (found - expected.double()).norm() <= bound * expected.double().norm()
    exact = skinny_linear_reference(x.cpu(), weight.cpu(), bias.cpu(), torch.float32).double()
    found = skinny_linear(x, weight, bias, torch.float32).cpu().double()
    assert (found - exact).norm() <= 2e-4 * exact.norm()
