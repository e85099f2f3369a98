"""What the busiest GPU has to do, counted by hand."""

from __future__ import annotations

import torch

from benchmarks.placement_gains import busiest, everything
from placement.plan import Dispatch, PlacementPlan

ROUTES = torch.tensor(
    [[[[0, 1], [0, 1]]], [[[0, 2], [3, 1]]]], dtype=torch.int32
)  # two steps of one layer, [S, L, T, K]


def test_busiest_gpu() -> None:
    plan = PlacementPlan("m", 4, 2, (0,), (((0, 1), (2, 3)),), dispatch=Dispatch())
    # First step: experts 0 and 1 with four pairs on GPU 0. Second: 0 and 1 on GPU 0, 2 and 3 on GPU 1.
    assert busiest(plan, ROUTES) == {"active_on_busiest_gpu": 2.0, "pairs_on_busiest_gpu": 3.0}
    with_copies = everything(plan)
    assert with_copies.slots == (((0, 1, 2, 3), (0, 1, 2, 3)),)
    assert busiest(with_copies, ROUTES) == {"active_on_busiest_gpu": 1.5, "pairs_on_busiest_gpu": 2.0}
