"""A few cases of every MoE kernel, to be run under NVIDIA's memory checker.

    compute-sanitizer --tool memcheck python -m tests.support.moe_memcheck

Odd sizes, a hot expert, pairs of other ranks; results are compared with the references too.
"""

from __future__ import annotations

import torch

from tests.support.moe_cases import check_combine, check_permute, check_products, check_route

PRODUCTS = ((1, 8, 32, 256, 96), (45, 2, 8, 200, 328), (300, 4, 8, 256, 384), (600, 4, 8, 100, 20))


def main() -> None:
    """Run the cases."""
    for rule in ("renormalised", "sigmoid"):
        check_route("cuda", rule, tokens=7, experts=32, top_k=4)
    for kind in ("hot", "foreign"):
        check_permute("cuda", kind, tokens=33, top_k=2, num_slots=8)
        for sizes in PRODUCTS:
            check_products("cuda", torch.bfloat16, kind, sizes, "gpt_oss")
    check_combine("cuda", torch.bfloat16, tokens=9, top_k=4, width=2880, with_shared=True)
    print("all cases agree with the references")


if __name__ == "__main__":
    main()
