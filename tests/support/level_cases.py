"""The kernel of the rule `level` against its reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kernels.level_dispatch import DispatchTable, dispatch_tokens, level_dispatch
from kernels.level_dispatch.kernel import level_triton
from kernels.level_dispatch.reference import level_slots_reference
from kernels.level_dispatch.runs import gpus_of_choices, slots_of_choices
from tests.support.moe_cases import poisoned

CASES = json.loads((Path(__file__).parents[1] / "data" / "level_dispatch_cases.json").read_text())


def make_copies(num_experts: int, num_gpus: int, extra: int, generator: torch.Generator) -> torch.Tensor:
    """Random copies ``[E, G]``: one each, and so many more."""
    holds = torch.zeros(num_experts, num_gpus, dtype=torch.bool)
    holds[torch.arange(num_experts), torch.randint(num_gpus, (num_experts,), generator=generator)] = True
    free = (~holds).flatten().nonzero().flatten()
    holds.view(-1)[free[torch.randperm(len(free), generator=generator)[:extra]]] = True
    gpus = torch.where(holds, torch.arange(num_gpus), num_gpus).sort(dim=1).values
    return torch.where(gpus < num_gpus, gpus, -1)


def make_table(copies: torch.Tensor, rank: int, num_gpus: int, split_above: int | None, device: str) -> DispatchTable:
    """The table of one rank, whose slots are in the order of ids."""
    here = (copies == rank).any(dim=1)
    slots = torch.where(here, here.cumsum(0) - 1, -1).int()
    return DispatchTable.build(copies, slots.to(device), rank, num_gpus, split_above)


def check_counts(device: str, case: dict[str, Any]) -> None:
    """One of the shared cases that give pairs per expert."""
    copies = torch.tensor(case["copies"])
    table = make_table(copies, 0, case["num_gpus"], case["split_above_tokens"], device)
    counts = torch.tensor(case["tokens_per_expert"], dtype=torch.int32, device=device)
    with poisoned():
        chosen, _ = level_triton(counts[None], table, counts)
    assert chosen.tolist() == case["chosen"], case["name"]


def check_tokens(
    device: str, experts: torch.Tensor, copies: torch.Tensor, num_gpus: int, split_above: int | None, ranks: range
) -> None:
    """These ranks' slots of routes ``[T, K]``, by both ways to lay pairs out, and the choices."""
    ids = experts.int().contiguous().to(device)
    counts = torch.bincount(experts.flatten(), minlength=len(copies)).int()
    expected = level_dispatch(counts, copies, num_gpus, split_above)
    for rank in ranks:
        table = make_table(copies, rank, num_gpus, split_above, device)
        slots = level_slots_reference(ids, table)
        assert torch.equal(slots_of_choices(ids, expected.to(device), counts.to(device), table), slots)
        with poisoned():
            chosen, found = level_triton(ids, table)
        assert chosen.tolist() == expected.tolist()
        assert found is not None
        assert torch.equal(found, slots)
    check_padded(device, experts, table)


def check_padded(device: str, experts: torch.Tensor, table: DispatchTable) -> None:
    """Slots and GPUs of routes among which there are rows of padding, by both ways to lay pairs out."""
    gpus = dispatch_tokens(experts, table.copies, table.num_gpus, table.split_above_tokens).int()
    rows = torch.arange(len(experts)) * 3 // 2  # every third row is padding
    padded, expected, slots = torch.full((3, 2 + 2 * len(experts), experts.shape[1]), -1, dtype=torch.int32)
    padded[rows], expected[rows] = experts.int(), gpus
    slots[rows] = torch.where(gpus == table.rank, table.slot_of_expert.cpu()[experts], -1)
    padded = padded.to(device)
    served = torch.empty_like(padded)
    with poisoned():
        chosen, found = level_triton(padded, table, served=served)
    assert found is not None
    assert torch.equal(found.cpu(), slots)
    assert torch.equal(served.cpu(), expected)
    counts = torch.bincount(experts.flatten(), minlength=len(table.holders)).int().to(device)
    both = gpus_of_choices(padded, chosen, counts, table)
    assert torch.equal(torch.where(padded < 0, -1, both).cpu(), expected)


def check_random(
    device: str, seed: int, sizes: tuple[int, int, int, int, int], split_above: int | None, skew: float = 0.0
) -> None:
    """Random routes of T tokens to K of E experts on G GPUs with so many extra copies; skewed to low ids."""
    tokens, top_k, num_experts, num_gpus, extra = sizes
    generator = torch.Generator().manual_seed(seed)
    copies = make_copies(num_experts, num_gpus, extra, generator)
    scores = torch.rand(tokens, num_experts, generator=generator) - skew * torch.linspace(0, 1, num_experts)
    experts = scores.argsort(dim=1, descending=True)[:, :top_k]
    check_tokens(device, experts, copies, num_gpus, split_above, range(seed % num_gpus, num_gpus, 3))


def check_shared_cases(device: str) -> None:
    """All of them but those of the rule `nearest`."""
    for case in CASES:
        if "chosen" in case:
            check_counts(device, case)
        elif "homes" not in case:
            experts = torch.tensor(case["experts"], dtype=torch.int64).view(len(case["experts"]), -1)
            if experts.numel():
                gpus, limit = case["num_gpus"], case["split_above_tokens"]
                check_tokens(device, experts, torch.tensor(case["copies"]), gpus, limit, range(gpus - 1, gpus))
