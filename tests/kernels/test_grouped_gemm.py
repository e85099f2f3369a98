"""The experts' products: the reference against Transformers' experts, and the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels.combine import combine
from kernels.grouped_gemm import down, gate_up
from kernels.permute import permute
from kernels.route import Routes


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_equal_to_transformers(family: str) -> None:
    torch.manual_seed(0)
    tokens, top_k, width, inner, experts = 9, 2, 16, 24, 5
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    weights, x = torch.rand(tokens, top_k), torch.randn(tokens, width)
    first, second = torch.randn(experts, 2 * inner, width) * 0.6, torch.randn(experts, width, inner) * 0.3
    if family == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        theirs = MixtralExperts(MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts))
        theirs.gate_up_proj.data, theirs.down_proj.data = first, second
        activation, biases = "silu", (None, None)
    else:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        theirs = GptOssExperts(GptOssConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts))
        first = first * 6  # so that the clamps are felt
        biases = (torch.randn(experts, 2 * inner), torch.randn(experts, width))
        interleaved = torch.stack(first.chunk(2, dim=1), dim=2).flatten(1, 2)
        theirs.gate_up_proj.data, theirs.down_proj.data = interleaved.transpose(1, 2), second.transpose(1, 2)
        theirs.gate_up_proj_bias.data = torch.stack(biases[0].chunk(2, dim=1), dim=2).flatten(1, 2)
        theirs.down_proj_bias.data = biases[1]
        activation = "gpt_oss"
    with torch.no_grad():
        expected = theirs(x, ids, weights)
    permutation = permute(ids.int(), experts)
    hidden = gate_up(x, first, permutation, top_k, activation, biases[0])
    pairs = down(hidden, second, permutation, biases[1])
    routes = Routes(ids.int(), ids.int(), weights)
    total, _ = combine(pairs, routes, None, torch.zeros_like(x), torch.ones(width), 1e-5)
    torch.testing.assert_close(total, expected, atol=2e-4, rtol=1e-5)


def test_rows_of_other_ranks_are_not_numbers_in_the_reference() -> None:
    slots = torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32)
    hidden = gate_up(torch.randn(3, 4), torch.randn(2, 6, 4), permute(slots, 2), 2)
    assert hidden.isnan().all(1).tolist() == [False, True, True, True, False, False]


def test_no_tokens() -> None:
    permutation = permute(torch.empty(0, 2, dtype=torch.int32), 3)
    hidden = gate_up(torch.empty(0, 4), torch.randn(3, 6, 4), permutation, 2)
    assert hidden.shape == (0, 3)
    assert down(hidden, torch.randn(3, 4, 3), permutation).shape == (0, 4)
