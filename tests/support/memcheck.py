"""A few cases of every kernel, to be run under NVIDIA's memory checker.

    compute-sanitizer --tool memcheck python -m tests.support.memcheck

Odd sizes, a hot expert, pairs of other ranks, padding, empty sequences; results are compared with the references too.
"""

from __future__ import annotations

import torch

from kernels.head_linear import head_linear, head_linear_reference
from kernels.norm_linear import norm_linear
from kernels.rms_norm import add_rms_norm
from kernels.skinny_linear import skinny_linear
from kernels.skinny_linear.reference import skinny_linear_reference
from tests.support import attention_cases as attention
from tests.support.moe_cases import check_combine, check_permute, check_products, check_route

PRODUCTS = ((1, 8, 32, 256, 96), (45, 2, 8, 200, 328), (300, 4, 8, 256, 384), (600, 4, 8, 100, 20))
LENGTHS = [1, 0, 700, 16, 17, 264]


def main() -> None:
    """Run the cases."""
    experts()
    cached_attention()
    small_ones()
    print("all cases agree with the references")


def experts() -> None:
    """Routing, the experts' products and their sum."""
    for rule in ("renormalised", "sigmoid"):
        check_route("cuda", rule, tokens=7, experts=32, top_k=4)
    for kind in ("hot", "foreign"):
        check_permute("cuda", kind, tokens=33, top_k=2, num_slots=8)
        for sizes in PRODUCTS:
            check_products("cuda", torch.bfloat16, kind, sizes, "gpt_oss")
    check_combine("cuda", torch.bfloat16, tokens=9, top_k=4, width=2880, with_shared=True)


def cached_attention() -> None:
    """Attention over paged caches, dense and latent, and the writes into them."""
    for page_size in (16, 64):
        attention.check_decode_attention("cuda", torch.bfloat16, LENGTHS, (32, 4, 128), page_size)
        attention.check_decode_attention("cuda", torch.bfloat16, LENGTHS, (64, 8, 64), page_size, 128, sinks=True)
        attention.check_mla("cuda", torch.bfloat16, LENGTHS, (16, 512, 64), page_size)
    attention.check_decode_attention("cuda", torch.float32, [3000], (6, 2, 80), 16, extra_pages=200)
    for norm in (None, "head", "projection"):
        attention.check_rope_cache("cuda", torch.bfloat16, 7, (32, 4, 128), 128, norm)
    attention.check_rope_cache("cuda", torch.bfloat16, 7, (64, 8, 64), 32, interleaved=True)


def small_ones() -> None:
    """Norm, linear layers of few tokens, sampling."""
    for tokens in (1, 7):
        attention.check_rms_norm("cuda", torch.bfloat16, tokens, 2880)
        attention.check_sample("cuda", torch.bfloat16, tokens, 15_193)
    for tokens, width, rows in ((1, 2880, 5), (3, 100, 201), (4, 4096, 33)):
        x, weight, bias = (torch.randn(size, device="cuda") for size in ((tokens, width), (rows, width), (rows,)))
        x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
        attention.assert_near(skinny_linear(x, weight, bias), skinny_linear_reference(x, weight, bias))
    for tokens, size, outputs in ((1, 128, 500), (4, 500, 33)):
        x, weight = torch.randn(tokens, 3, size, device="cuda"), torch.randn(3, size, outputs, device="cuda")
        attention.assert_near(head_linear(x, weight), head_linear_reference(x, weight))
    for tokens, width in ((1, 2880), (8, 100)):
        x, residual = torch.randn(2, tokens, width, device="cuda").bfloat16()
        norm, weight = torch.ones(width, device="cuda"), torch.randn(33, width, device="cuda").bfloat16()
        total, normed, found = norm_linear(x, residual, norm, 1e-6, weight)
        for mine, theirs in zip((total, normed), add_rms_norm(x, residual, norm, 1e-6), strict=True):
            attention.assert_near(mine, theirs)
        attention.assert_near(found, skinny_linear_reference(normed, weight))


if __name__ == "__main__":
    main()
