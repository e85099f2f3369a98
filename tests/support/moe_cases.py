"""Every MoE kernel against its reference, on a GPU or in Triton's interpreter; outputs start as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from kernels.combine import combine_reference
from kernels.grouped_gemm import down_reference, gate_up_reference
from kernels.permute import Permutation, permute_reference
from kernels.route import Routes, route_reference
from kernels.route.reference import Scoring
from kernels.route_permute import MOST_COMPARISONS

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RULES: dict[str, dict[str, Any]] = {
    "plain": {"renormalise": False},
    "renormalised": {"renormalise": True},
    "groups by max": {"renormalise": False, "num_groups": 4, "top_groups": 2, "scale": 16.0},
    "sigmoid": {
        "scoring": "sigmoid",
        "renormalise": True,
        "num_groups": 4,
        "top_groups": 2,
        "group_score": "top2_sum",
        "scale": 2.5,
    },
}


@contextmanager
def poisoned() -> Iterator[None]:
    """What `torch.empty` gives is NaN, or -7 where it holds integers."""

    def filled(like: Any) -> Any:
        def make(*arguments: Any, **options: Any) -> torch.Tensor:
            tensor = like(*arguments, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

        return make

    with (
        mock.patch("torch.empty", filled(torch.empty)),
        mock.patch("torch.empty_like", filled(torch.empty_like)),
        mock.patch("torch.Tensor.new_empty", filled(torch.Tensor.new_empty)),
    ):
        yield


def make_slots(kind: str, tokens: int, top_k: int, num_slots: int, seed: int = 0) -> torch.Tensor:
    """Slots ``[T, K]``, distinct within a token: of random experts, one hot expert, or half on other ranks."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_slots, generator=generator)
    if kind == "hot":
        scores[:, num_slots - 1] += 2
    slots = scores.argsort(dim=1, descending=True)[:, :top_k].int()
    if kind == "foreign":
        slots[torch.rand(tokens, top_k, generator=generator) < 0.5] = -1
    return slots.contiguous()


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal within a share of the expected values' root mean square; NaN where expected, and nowhere else."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    numbers = ~expected.isnan()
    assert torch.equal(~found.isnan(), numbers)
    if numbers.any():
        scale = expected[numbers].pow(2).mean().sqrt()
        error = (found[numbers] - expected[numbers]).abs().max() / scale
        assert error <= 6 * tolerance, f"largest error {error:.2e} of the root mean square"


def make_logits(tokens: int, experts: int) -> torch.Tensor:
    """Float32 logits ``[T, E]`` with ties, and with one NaN from three tokens on."""
    logits = (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)) * 8).round() / 4
    if tokens > 2:
        logits[2, 1] = torch.nan
    return logits


def check_routes(found: Routes, expected: Routes) -> None:
    """Ids and slots exactly, weights within rounding."""
    assert torch.equal(found.ids.cpu(), expected.ids)
    assert torch.equal(found.slots.cpu(), expected.slots)
    torch.testing.assert_close(found.weights.cpu(), expected.weights, atol=1e-6, rtol=1e-5, equal_nan=True)


def check_permutation(found: Permutation, expected: Permutation) -> None:
    """The same pairs of every slot, in the same order."""
    assert torch.equal(found.indptr.cpu(), expected.indptr)
    here = int(expected.indptr[-1])
    assert torch.equal(found.order.cpu()[:here], expected.order[:here])


def _scoring(rule: str, top_k: int, experts: int, device: str) -> tuple[Scoring, Scoring]:
    """One rule on the CPU and on a device."""
    values = RULES[rule]
    bias = torch.linspace(-0.2, 0.2, experts) if values.get("scoring") == "sigmoid" else None
    return Scoring(top_k, bias=bias, **values), Scoring(top_k, bias=None if bias is None else bias.to(device), **values)


def check_route(device: str, rule: str, tokens: int, experts: int, top_k: int) -> None:
    """Routing alone, and with the permutation in the same launch."""
    from kernels.route.kernel import route_triton
    from kernels.route_permute.kernel import route_permute_triton

    logits = make_logits(tokens, experts)
    slot_of_expert = torch.randperm(experts, generator=torch.Generator().manual_seed(1)).int() - experts // 4
    slot_of_expert[slot_of_expert < 0] = -1
    ours, theirs = _scoring(rule, top_k, experts, device)
    for slots in (None, slot_of_expert):
        expected = route_reference(logits, ours, slots)
        arguments = (theirs, None if slots is None else slots.to(device))
        with poisoned():
            check_routes(route_triton(logits.to(device), *arguments), expected)
            if 0 < tokens * top_k * max(tokens * top_k, experts) <= MOST_COMPARISONS:
                routes, permutation = route_permute_triton(logits.to(device), experts, *arguments)
                check_routes(routes, expected)
                check_permutation(permutation, permute_reference(expected.slots, experts))


def check_permute(device: str, kind: str, tokens: int, top_k: int, num_slots: int) -> None:
    """The permutation of one kind of slots."""
    from kernels.permute.kernel import permute_triton

    slots = make_slots(kind, tokens, top_k, num_slots)
    with poisoned():
        check_permutation(permute_triton(slots.to(device), num_slots), permute_reference(slots, num_slots))


def check_products(
    device: str,
    dtype: torch.dtype,
    kind: str,
    sizes: tuple[int, int, int, int, int],
    activation: str = "silu",
    tiles: Any = None,
) -> None:
    """Both products of sizes (tokens, top_k, slots, width, inner), with biases where the activation is gpt-oss's."""
    from kernels.grouped_gemm.kernel import down_triton, gate_up_triton

    tokens, top_k, num_slots, width, inner = sizes
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    permutation = permute_reference(make_slots(kind, tokens, top_k, num_slots), num_slots)
    permutation = Permutation(*(part.to(device) for part in permutation))
    x, biases = draw(tokens, width), (None, None)
    first, second = draw(num_slots, 2 * inner, width, scale=width**-0.5), draw(num_slots, width, inner, scale=0.1)
    if activation == "gpt_oss":
        first *= 6  # so that the clamps are felt
        biases = (draw(num_slots, 2 * inner), draw(num_slots, width))
    expected = gate_up_reference(x, first, permutation, top_k, activation, biases[0])
    with poisoned():
        hidden = gate_up_triton(x, first, permutation, top_k, activation, biases[0], tiles)
        assert_close(hidden, expected, TOLERANCE[dtype])
        hidden = gate_up_triton(x, first, permutation, top_k, activation, biases[0], tiles)
        out = down_triton(hidden, second, permutation, biases[1], tiles)
        again = down_triton(hidden, second, permutation, biases[1], tiles)
    assert_close(out, down_reference(hidden, second, permutation, biases[1]), TOLERANCE[dtype])
    assert torch.equal(out.nan_to_num(), again.nan_to_num())


def check_combine(device: str, dtype: torch.dtype, tokens: int, top_k: int, width: int, with_shared: bool) -> None:
    """The combination with rows of other ranks that are NaN."""
    from kernels.combine.kernel import combine_triton

    generator = torch.Generator().manual_seed(width)
    slots = make_slots("foreign", tokens, top_k, 2 * top_k)
    routes = Routes(slots, slots, torch.rand(tokens, top_k, generator=generator))
    pairs = torch.randn(tokens * top_k, width, generator=generator)
    pairs[slots.flatten() < 0] = torch.nan
    shared, residual = torch.randn(2, tokens, width, generator=generator)
    norm = torch.randn(width, generator=generator)
    given = [part.to(device, dtype) for part in (shared, residual, norm)]
    given[0] = given[0] if with_shared else None
    pairs, routes = pairs.to(device, dtype), Routes(*(part.to(device) for part in routes))
    expected = combine_reference(pairs, routes, *given, 1e-5)
    with poisoned():
        found = combine_triton(pairs, routes, *given, 1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE[dtype])
