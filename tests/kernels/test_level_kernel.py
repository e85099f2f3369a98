"""The kernel of the rule `level`: in Triton's interpreter, compiled for Hopper, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.level_dispatch import level_dispatch, level_pairs, level_slots
from kernels.level_dispatch.runs import slots_of_choices
from tests.support.triton_compile import in_compiler, in_interpreter

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_shared_cases_in_interpreter() -> None:
    in_interpreter(
        """
        from tests.support.level_cases import check_shared_cases
        check_shared_cases("cpu")
        """
    )


def test_random_plans_in_interpreter() -> None:
    in_interpreter(
        """
        from hypothesis import given, settings, strategies as st
        from tests.support.level_cases import check_random

        @settings(max_examples=8, deadline=None, derandomize=True, database=None)
        @given(st.data())
        def check(data):
            gpus, experts = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 20))
            sizes = data.draw(st.integers(1, 14)), data.draw(st.integers(1, experts)), experts, gpus
            extra, limit = data.draw(st.integers(1, experts * (gpus - 1))), data.draw(st.none() | st.integers(0, 6))
            seed, skew = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 2.0]))
            check_random("cpu", seed, (*sizes, extra), limit, skew)

        check()
        from unittest import mock
        with mock.patch("kernels.level_dispatch.kernel.LARGEST_BLOCK", 128):  # several blocks, and runs across them
            check_random("cpu", 1, (140, 4, 32, 4, 16), 64, 1.0)
        """
    )


def test_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.level_dispatch.kernel import level_kernel
        from tests.support.triton_compile import compile_for_sm90

        integers = "num_pairs num_experts num_single num_gpus split_above rank".split()
        pointers = "ids counts holders places slot_of_expert chosen slots served".split()
        signature = dict.fromkeys(pointers, "*i32") | dict.fromkeys(integers, "i32")
        signature |= {"fields": "*i16", "words": "*i64", "choices": "*i32"}
        for left_out in (("counts", "served"), ("slots", "served"), ("counts",)):
            constants = dict.fromkeys(left_out) | {"BLOCK": 1024, "BLOCK_E": 128, "OVERLAP": True}
            given = {name: kind for name, kind in signature.items() if name not in left_out}
            built = compile_for_sm90(level_kernel, given, constants, num_warps=4)
            assert "bar.sync" in built.asm["ptx"]
        """
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_slots_of_choices(data: st.DataObject) -> None:
    from tests.support.level_cases import make_copies, make_table

    gpus, experts, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    copies = make_copies(experts, gpus, data.draw(st.integers(0, experts * (gpus - 1))), generator)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, : data.draw(st.integers(1, experts))]
    limit = data.draw(st.none() | st.integers(0, 6))
    counts = torch.bincount(ids.flatten(), minlength=experts)
    chosen = level_dispatch(counts, copies, gpus, limit)
    served = torch.zeros_like(ids)
    padded = torch.cat([torch.full_like(ids[:2], -1), ids, torch.full_like(ids[:1], -1)]).int()
    for rank in range(gpus):
        table = make_table(copies, rank, gpus, limit, "cpu")
        slots = level_slots(ids.int(), table)
        assert slots.dtype == torch.int32
        assert torch.equal(slots_of_choices(ids.int(), chosen, counts, table), slots)
        of_padded, serving = level_pairs(padded, table)
        assert of_padded.dtype == serving.dtype == torch.int32
        assert torch.equal(of_padded[len(ids[:2]) :][: len(ids)], slots)
        assert torch.equal(serving == rank, of_padded >= 0)
        assert torch.equal(serving < 0, padded < 0)
        here = slots >= 0
        served += here
        assert torch.equal(slots[here], table.slot_of_expert[ids[here]])
    assert (served == 1).all(), "exactly one rank serves each pair"


@GPU
@pytest.mark.gpu
def test_on_gpu() -> None:
    from tests.support.level_cases import check_random, check_shared_cases

    check_shared_cases("cuda")
    for seed in range(40):
        check_random("cuda", seed, (1 + seed % 33, 8, 128, 2 + seed % 7, 16 * (seed % 8)), None, seed % 3)
        check_random("cuda", seed, (200, 4, 32, 1 + seed % 8, seed % 8), 64, seed % 3)
    check_random("cuda", 1, (256, 8, 256, 8, 64), 8, 1.0)
    check_random("cuda", 2, (1000, 8, 128, 4, 128), 64, 1.0)
