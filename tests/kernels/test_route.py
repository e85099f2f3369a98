"""Routing: the reference against Transformers' routers, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.errors import OperatorError
from kernels.route import route


def test_softmax_by_hand() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    plain = route(logits, top_k=2, renormalise=False)
    assert plain.ids.tolist() == [[1, 3], [0, 1]]  # equal scores: the lower id first
    torch.testing.assert_close(plain.weights, torch.stack([logits[0].softmax(0)[[1, 3]], torch.full((2,), 0.25)]))
    normal = route(logits, top_k=2, renormalise=True, scale=3.0)
    torch.testing.assert_close(normal.weights, torch.full((2, 2), 1.5))


def test_slots_and_absent_experts() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    routes = route(logits, top_k=3, renormalise=True, slot_of_expert=torch.tensor([0, 5, -1, 2], dtype=torch.int32))
    assert routes.ids.tolist() == [[3, 2, 1]]
    assert routes.slots.tolist() == [[2, -1, 5]]
    assert (routes.ids.dtype, routes.slots.dtype, routes.weights.dtype) == (torch.int32, torch.int32, torch.float32)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_equal_to_transformers(family: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 16), torch.randn(32, 16)
    if family == "deepseek_v3":
        from transformers import DeepseekV3Config as Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router
    elif family == "deepseek_v2":
        from transformers import DeepseekV2Config as Config
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter as Router
    else:
        from transformers import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter as Router
    groups = {} if family == "gpt_oss" else {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 2.5}
    methods = {"deepseek_v2": {"topk_method": "group_limited_greedy"}, "deepseek_v3": {"norm_topk_prob": True}}
    experts = {"gpt_oss": "num_local_experts"}.get(family, "n_routed_experts")
    config = Config(
        hidden_size=16,
        num_attention_heads=2,
        num_experts_per_tok=4,
        **{experts: 32},
        **groups,
        **methods.get(family, {}),
    )
    router = Router(config)
    bias = torch.randn(32) * 0.1
    router.weight.data.copy_(weight)
    if family == "gpt_oss":
        router.bias.data.copy_(bias)
        logits, rule = x @ weight.T + bias, {"renormalise": True}
    else:
        logits, rule = x @ weight.T, {"num_groups": 8, "top_groups": 3, "scale": 2.5}
        rule |= {"renormalise": family == "deepseek_v3"}
    if family == "deepseek_v3":
        router.e_score_correction_bias.copy_(bias)
        rule |= {"scoring": "sigmoid", "bias": bias, "group_score": "top2_sum"}
    with torch.no_grad():
        _, weights, ids = router(x)
    found = route(logits, top_k=4, **rule)
    expected = torch.zeros(50, 32).scatter(1, ids, weights.float())  # their order among the chosen is free
    torch.testing.assert_close(torch.zeros(50, 32).scatter(1, found.ids.long(), found.weights), expected)
    if family != "deepseek_v3":
        assert (found.weights.diff(dim=1) <= 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.sampled_from([4, 6, 12, 40]), st.integers(1, 4), st.integers(0, 2**31))
def test_top_k_of_distinct_scores(tokens: int, experts: int, top_k: int, seed: int) -> None:
    logits = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 8
    routes = route(logits, top_k=top_k, renormalise=True)
    best = [sorted(range(experts), key=lambda e, row=row: (-float(row.softmax(0)[e]), e))[:top_k] for row in logits]
    assert routes.ids.tolist() == best
    torch.testing.assert_close(routes.weights.sum(1), torch.ones(tokens))


def test_nan_rows_give_valid_experts() -> None:
    logits = torch.full((1, 4), torch.nan)
    routes = route(logits, top_k=2, renormalise=True)
    assert routes.ids.tolist() == [[0, 1]]
    assert routes.weights.isnan().all()


def test_too_few_experts_or_unequal_groups() -> None:
    with pytest.raises(OperatorError, match="top-5 of 4 experts"):
        route(torch.zeros(1, 4), top_k=5, renormalise=True)
    with pytest.raises(OperatorError, match="top-3 of 8 experts in 1 of 4 groups"):
        route(torch.zeros(1, 8), top_k=3, renormalise=True, num_groups=4)
    with pytest.raises(OperatorError, match="4 experts do not divide into 3 groups"):
        route(torch.zeros(1, 4), top_k=1, renormalise=True, num_groups=3)
