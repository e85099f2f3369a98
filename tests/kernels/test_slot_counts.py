"""The slots' counts: the reference against a loop over pairs, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.slot_counts import add_slot_counts, add_slot_counts_reference
from tests.support.triton_compile import in_compiler, in_interpreter

# layers, tokens, choices, slots
SIZES = ((1, 0, 2, 3), (2, 1, 8, 128), (3, 33, 4, 7), (2, 300, 8, 96), (1, 700, 3, 32))


def make_pass(layers: int, tokens: int, top_k: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots with foreign pairs among them, and places with padding among them."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(-1, slots, (layers, tokens, top_k), generator=generator, dtype=torch.int32)
    return chosen, torch.randint(-1, 5, (tokens,), generator=generator)


def check_kernel(device: str) -> None:
    """Two passes, with and without places, with and without activity."""
    from kernels.slot_counts.kernel import add_slot_counts_triton

    for layers, tokens, top_k, slots in SIZES:
        chosen, places = make_pass(layers, tokens, top_k, slots)
        expected = torch.zeros((2, layers, slots), dtype=torch.int64)
        found = expected.to(device)
        for given_places, with_active in ((places, True), (None, False), (None, True)):
            arguments = (chosen, given_places)
            add_slot_counts_reference(*arguments, expected[0], expected[1] if with_active else None)
            on_device = (None if argument is None else argument.to(device) for argument in arguments)
            add_slot_counts_triton(*on_device, found[0], found[1] if with_active else None)
        assert torch.equal(found.cpu(), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(0, 6), st.integers(1, 3), st.integers(1, 5), st.data())
def test_every_pair_is_counted_once(layers: int, tokens: int, top_k: int, slots: int, data: st.DataObject) -> None:
    size = layers * tokens * top_k
    flat = data.draw(st.lists(st.integers(-1, slots - 1), min_size=size, max_size=size))
    places = data.draw(st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens))
    chosen = torch.tensor(flat, dtype=torch.int32).view(layers, tokens, top_k)
    pairs, active = torch.full((layers, slots), 5), torch.full((layers, slots), 7)
    add_slot_counts(chosen, torch.tensor(places, dtype=torch.int64), pairs, active)
    for layer in range(layers):
        real = [chosen[layer, token].tolist() for token in range(tokens) if places[token] >= 0]
        for slot in range(slots):
            count = sum(choices.count(slot) for choices in real)
            assert pairs[layer, slot] == 5 + count
            assert active[layer, slot] == 7 + (count > 0)


def test_kernel_in_interpreter() -> None:
    in_interpreter("from tests.kernels.test_slot_counts import check_kernel; check_kernel('cpu')")


def test_kernel_compiles_for_hopper() -> None:
    in_compiler(
        """
        from kernels.slot_counts.kernel import slot_counts_kernel
        from tests.support.triton_compile import compile_for_sm90

        signature = {"slots": "*i32", "places": "*i64", "pairs": "*i64", "active": "*i64"}
        signature |= {"num_pairs": "i32", "num_slots": "i32"}
        constants = {"TOP_K": 8, "OVERLAP": True}
        for block, bins in ((32, 128), (1024, 512)):
            compile_for_sm90(slot_counts_kernel, signature, constants | {"BLOCK": block, "BINS": bins}, num_warps=4)
        without = {name: kind for name, kind in signature.items() if name not in ("places", "active")}
        constants |= {"places": None, "active": None, "BLOCK": 1024, "BINS": 32}
        compile_for_sm90(slot_counts_kernel, without, constants, num_warps=4)
        """
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.gpu
def test_kernel_on_gpu() -> None:
    check_kernel("cuda")
