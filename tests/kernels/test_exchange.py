"""The exchange between GPUs: several processes in Triton's interpreter, compiled for Hopper, and on GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels.errors import OperatorError
from kernels.exchange import Mailbox, gather
from kernels.exchange.mailbox import messages
from kernels.exchange.reference import finish, rows_served, sum_parts
from tests.support.triton_compile import ROOT, in_compiler, in_interpreter

GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


def test_two_ranks_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from tests.support.exchange_cases import check_in_interpreter
        cases = [((3, 2, 24), torch.float32), ((1, 3, 40), torch.float16), ((2, 1, 64), torch.bfloat16)]
        check_in_interpreter(2, cases)
        """
    )


def test_three_ranks_two_ways_in_interpreter() -> None:
    in_interpreter(
        """
        import torch
        from unittest import mock
        from tests.support.exchange_cases import check_in_interpreter
        with mock.patch("kernels.exchange.TWO_WAY_BYTES", 100), mock.patch("kernels.exchange.PROGRAMS", 2):
            check_in_interpreter(3, [((4, 2, 24), torch.float32), ((1, 1, 16), torch.float32)])  # two ways, then one
        """
    )


def test_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.exchange import alltoall, kernel
        from tests.support.triton_compile import compile_for_sm90

        scalars = dict.fromkeys("num_rows most_rows stride width rank".split(), "i32") | {"eps": "fp32"}
        types = scalars | dict.fromkeys("box peers sums sum_peers".split(), "*i64") | {"weights": "*fp32"}
        types |= {"norm_weight": "*bf16"} | dict.fromkeys("received places gpu_of_expert".split(), "*i64")

        def build(which, left_out=(), **constants):
            constants = {"GPUS": 8, "BLOCK": 1024, "OVERLAP": True} | constants | dict.fromkeys(left_out)
            names = [name for name in which.arg_names if name not in constants]
            warps = max(1, constants["BLOCK"] // 128)
            return compile_for_sm90(which, {n: types.get(n, "*i32") for n in names}, constants, num_warps=warps)

        one_way = ("shared", "sums", "sum_peers")
        built = build(kernel.reduce_kernel, one_way, TOP_K=8, KIND="bf16")
        assert "ld.volatile.global" in built.asm["ptx"], "a row is read again until it is there"
        build(kernel.reduce_kernel, ("slots", "weights", "shared"), TOP_K=0, KIND="fp16")
        build(kernel.gather_kernel)
        build(kernel.gather_kernel, BLOCK=2)  # of a token
        build(alltoall.gather_routes_kernel, TOP_K=8, BLOCK=16)
        build(alltoall.gather_routes_kernel, ("slots", "gpus", "slot_of_expert", "gpu_of_expert"), TOP_K=4, BLOCK=8)
        build(alltoall.dispatch_kernel, TOP_K=8)
        build(alltoall.collect_kernel, TOP_K=4, KIND="bf16")
        """
    )


def test_reference_sums_in_order() -> None:
    parts = torch.tensor([[1e8], [1.0], [-1e8]])
    assert sum_parts(parts).tolist() == [0.0], "1 is lost beside 1e8"
    assert sum_parts(parts[[0, 2, 1]]).tolist() == [1.0]
    total, normed = finish(torch.tensor([[3.0, 4.0]]), None, torch.zeros(1, 2), torch.ones(2), 0.0)
    assert total.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(normed, torch.tensor([[3.0, 4.0]]) / 12.5**0.5)
    assert rows_served(torch.tensor([[0, 2], [1, 1]]), 2).tolist() == [True, False]


def test_rows_that_do_not_fit_are_refused() -> None:
    mailbox = Mailbox.in_memory(torch.zeros(messages(2, 4, 8), dtype=torch.int64), [0, 0], 0, 4, 8)
    for shape in ((5, 8), (4, 9)):
        with pytest.raises(OperatorError, match="expected at most 4 of 32; make a larger mailbox"):
            gather(torch.zeros(shape), mailbox)


@GPUS
@pytest.mark.gpu
def test_on_gpus() -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(min(torch.cuda.device_count(), 4)),
    ]
    done = subprocess.run(
        [*command, "-m", "tests.support.exchange_cases"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
