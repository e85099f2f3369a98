"""A matrix for every head: reference, kernel in Triton's interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels.head_linear import head_linear, head_linear_reference
from tests.support.triton_compile import in_compiler, in_interpreter

# tokens, heads, entries and outputs of a head
SHAPES = [(1, 3, 16, 40), (4, 2, 24, 7), (5, 3, 9, 16), (0, 2, 16, 8)]


def make(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Vectors inside wider ones, and the two halves of one projection: by columns and by rows contiguous."""
    tokens, heads, size, outputs = sizes
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, heads * (size + 8) + 4, generator=generator).to(dtype).to(device)
    x = wide[:, : heads * (size + 8)].unflatten(1, (heads, -1))[..., :size]
    by_columns = torch.randn(heads, size + 3, outputs, generator=generator).to(dtype).to(device)[:, :size]
    by_rows = torch.randn(heads, outputs + 3, size, generator=generator).to(dtype).to(device)[:, 3:].transpose(1, 2)
    return [x, by_columns, by_rows]


@pytest.mark.parametrize("sizes", SHAPES)
def test_reference(sizes: tuple[int, int, int, int]) -> None:
    x, *weights = make(sizes, torch.bfloat16, "cpu")
    for weight in weights:
        found = head_linear(x, weight)
        assert found.is_contiguous()
        assert found.dtype == torch.bfloat16
        expected = (x.double()[..., None] * weight.double()).sum(2)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from kernels.head_linear.kernel import head_linear_triton
        from kernels.head_linear.reference import head_linear_reference
        from tests.kernels.test_head_linear import SHAPES, make
        for sizes in (*SHAPES[:2], (2, 2, 512, 33)):
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
                x, *weights = make(sizes, dtype, "cpu")
                for weight in weights:
                    found = head_linear_triton(x, weight)
                    torch.testing.assert_close(found, head_linear_reference(x, weight), rtol=bound, atol=50 * bound)
        """
    )


def test_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.head_linear.kernel import _head_linear
        from tests.support.triton_compile import compile_for_sm90
        types = dict.fromkeys(("x", "weight", "out"), "*bf16")
        strides = {name: "i32" for name in _head_linear.arg_names if name.endswith("stride")}
        for size, outputs, contiguous in ((128, 512, "column_stride"), (512, 128, "row_stride")):
            signature = types | strides | {"N": "i32"}
            del signature[contiguous]
            constants = {"H": 16, "K": size, "T": 4, "BLOCK_K": size, "BLOCK_N": 8192 // size, "OVERLAP": True}
            kernel = compile_for_sm90(_head_linear, signature, constants | {contiguous: 1}, num_warps=4)
            assert "griddepcontrol.wait" in kernel.asm["ptx"]
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*SHAPES, (1, 16, 128, 512), (4, 16, 512, 128), (77, 16, 128, 512)])
def test_on_gpu(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, *weights = make(sizes, dtype, "cuda")
    bound = 2e-4 if dtype == torch.float32 else 2e-2
    for weight in weights:
        expected = head_linear_reference(x.cpu(), weight.cpu()).double()
        found = head_linear(x, weight).cpu().double()
        assert (found - expected).norm() <= bound * expected.norm()
