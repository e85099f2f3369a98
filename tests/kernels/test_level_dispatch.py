"""The torch reference of the rules `level` and `nearest` against the shared cases, and against the numpy reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.level_dispatch import dispatch_tokens, level_dispatch
from placement import dispatch as numpy_dispatch

CASES = json.loads((Path(__file__).parents[1] / "data" / "level_dispatch_cases.json").read_text())
EXPERT_CASES = [case for case in CASES if "chosen" in case]
TOKEN_CASES = [case for case in CASES if "gpus" in case]


def test_there_are_cases_of_both_kinds() -> None:
    assert len(EXPERT_CASES) >= 20
    assert len(TOKEN_CASES) >= 5
    assert sum("homes" in case for case in TOKEN_CASES) >= 5


@pytest.mark.parametrize("case", EXPERT_CASES, ids=[case["name"] for case in EXPERT_CASES])
def test_experts(case: dict[str, Any]) -> None:
    chosen = level_dispatch(
        torch.tensor(case["tokens_per_expert"]),
        torch.tensor(case["copies"]),
        case["num_gpus"],
        case["split_above_tokens"],
    )
    assert chosen.tolist() == case["chosen"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("case", TOKEN_CASES, ids=[case["name"] for case in TOKEN_CASES])
def test_tokens(case: dict[str, Any], dtype: torch.dtype) -> None:
    experts = torch.tensor(case["experts"], dtype=dtype).view(len(case["experts"]), -1)
    homes = torch.tensor(case["homes"], dtype=dtype) if "homes" in case else None
    gpus = dispatch_tokens(experts, torch.tensor(case["copies"]), case["num_gpus"], case["split_above_tokens"], homes)
    assert gpus.dtype == torch.int64
    assert gpus.tolist() == case["gpus"]


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, int | None]:
    """Routes ``[T, K]``, copies ``[E, C]``, GPUs and split limit."""
    num_gpus = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 12))
    holders = [
        sorted(draw(st.sets(st.integers(0, num_gpus - 1), min_size=1, max_size=num_gpus))) for _ in range(num_experts)
    ]
    widest = max(map(len, holders))
    copies = np.array([row + [-1] * (widest - len(row)) for row in holders])
    num_choices = draw(st.integers(1, num_experts))
    rows = st.permutations(range(num_experts)).map(lambda order: order[:num_choices])
    routes = np.array(draw(st.lists(rows, max_size=12)), dtype=np.int64).reshape(-1, num_choices)
    return routes, copies, num_gpus, draw(st.none() | st.integers(0, 6))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(steps(), st.none() | st.integers(0, 2**32 - 1))
def test_equal_to_numpy(step: tuple[np.ndarray, np.ndarray, int, int | None], seed: int | None) -> None:
    routes, copies, num_gpus, split_above = step
    homes = None if seed is None else np.random.default_rng(seed).integers(-1, num_gpus, size=len(routes))
    expected = numpy_dispatch.dispatch_tokens(routes, copies, num_gpus, split_above, homes)
    torch_homes = None if homes is None else torch.from_numpy(homes)
    found = dispatch_tokens(torch.from_numpy(routes), torch.from_numpy(copies), num_gpus, split_above, torch_homes)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_no_tokens() -> None:
    gpus = dispatch_tokens(torch.empty((0, 2), dtype=torch.int64), torch.tensor([[0, 1], [1, -1]]), 2, None)
    assert gpus.shape == (0, 2)
