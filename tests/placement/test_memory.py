"""Memory budgets: what fits is used and never exceeded; copies have a price in bytes and KV-cache tokens."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster import Cluster, Link
from placement.errors import ProblemError
from placement.memory import MemoryBudget, copy_price, describe_price, kv_bytes_per_token, slot_budget


def make_cluster(memory):
    """One node with this memory for experts on each GPU."""
    link = Link(0.0, 1e9)
    return Cluster("test", 1, len(memory), tuple(memory), 1e12, 1e14, 5.0, link, link, link)


@pytest.mark.parametrize(
    ("memory", "asked", "expected"),
    [
        ([1e6] * 4, None, (8, 8, 8, 8)),
        ([200, 1e6, 100, 1e6], None, (2, 15, 1, 14)),
        ([1e6] * 4, 10, (10, 10, 10, 10)),
        ([1e6] * 4, [16, 8, 4, 4], (16, 8, 4, 4)),
        ([1600, 800, 800, 450], "fill", (16, 8, 8, 4)),
        ([1e6, 500, 0, 1e6], "fill", (32, 5, 0, 32)),
        ([1e6] * 4, "+25%", (10, 10, 10, 10)),
        ([1e6] * 4, "+12.5%", (9, 9, 9, 9)),
        ([1e6] * 4, "+20%", (10, 10, 9, 9)),
        ([1e6] * 4, "+900%", (32, 32, 32, 32)),
        ([900, 1e6, 1e6, 1e6], "+25%", (9, 11, 10, 10)),
        ([900, 900, 900, 900], "+25%", (9, 9, 9, 9)),
    ],
)
def test_slots_by_request(memory, asked, expected):
    assert slot_budget(make_cluster(memory), 32, 10, asked, expert_bytes=10) == expected


def test_unknown_size_of_an_expert_leaves_memory_unchecked_but_does_not_fill():
    cluster = make_cluster([10, 10])
    assert slot_budget(cluster, 30, 24, 20, None) == (20, 20)
    assert slot_budget(cluster, 31, 24, None, None) == (16, 15)
    with pytest.raises(ProblemError, match="size of an expert"):
        slot_budget(cluster, 30, 24, "fill", None)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(1, 60),
    st.sampled_from([None, "fill", "+0%", "+30%", "+150%"]),
)
def test_a_budget_fits_memory_and_holds_every_expert(memory, num_experts, num_layers, expert_bytes, asked):
    room = [min(num_experts, size // (expert_bytes * num_layers)) for size in memory]
    try:
        budget = slot_budget(make_cluster(memory), num_experts, num_layers, asked, expert_bytes)
    except ProblemError as error:
        assert sum(room) < num_experts
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert all(slots <= most for slots, most in zip(budget, room, strict=True))
    share = {None: 0, "fill": math.inf, "+0%": 0, "+30%": 0.3, "+150%": 1.5}[asked]
    assert sum(budget) == min(sum(room), num_experts + (share if share == math.inf else int(num_experts * share)))
    if asked != "fill":  # even: no GPU with room left has over one slot less than another
        assert max(budget) - min((b for b, most in zip(budget, room, strict=True) if b < most), default=max(budget)) < 2


def test_memory_for_experts_follows_from_the_gpus():
    cluster = make_cluster([1.0, 1.0])
    memory = MemoryBudget(gpu_bytes=[2000, 1200], other_weights_bytes=300, kv_reserve_bytes=(200, 400))
    assert memory.for_experts(cluster) == (1500, 500)
    assert slot_budget(cluster, 16, 10, "fill", 10, memory) == (15, 5)
    assert slot_budget(cluster, 16, 10, None, 10, memory) == (11, 5)
    assert MemoryBudget().for_experts(cluster) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (7, "GPU 0 has 500 bytes for experts, room for 5 slots; 7 slots in 10 layers need 700"),
        ([5, 6], "GPU 1 has 500 bytes"),
        (-1, "slots_per_gpu -1"),
        (True, "slots_per_gpu True"),
        (2.5, "slots_per_gpu 2.5"),
        ([5], "list of 2"),
        ([5, None], "list of 2"),
        ("all", "slots_per_gpu 'all'"),
        ("25%", "such as +25%"),
        ("+nan%", "such as +25%"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_in_one_line(asked, message):
    with pytest.raises(ProblemError) as caught:
        slot_budget(make_cluster([500, 500]), 8, 10, asked, expert_bytes=10)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [None, 4, "fill", "+25%"])
def test_memory_for_less_than_one_copy_each_is_refused(asked):
    with pytest.raises(ProblemError, match=r"room for 9 slots .* takes 10: give more GPUs or memory"):
        slot_budget(make_cluster([500, 420]), 10, 10, asked, expert_bytes=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_bytes": -1}, "memory.gpu_bytes -1"),
        ({"gpu_bytes": float("nan")}, "memory.gpu_bytes nan"),
        ({"gpu_bytes": True}, "memory.gpu_bytes True"),
        ({"gpu_bytes": []}, r"memory.gpu_bytes \[\]"),
        ({"gpu_bytes": "80G"}, "memory.gpu_bytes '80G'"),
        ({"gpu_bytes": 10, "kv_reserve_bytes": [1, float("inf")]}, "memory.kv_reserve_bytes"),
        ({"gpu_bytes": 10, "other_weights_bytes": None}, "memory.other_weights_bytes None"),
        ({"kv_reserve_bytes": 5}, "without memory.gpu_bytes"),
        ({"kv_bytes_per_token": 0}, "memory.kv_bytes_per_token 0"),
        ({"kv_bytes_per_token": 1.5}, "memory.kv_bytes_per_token 1.5"),
    ],
)
def test_a_wrong_memory_setting_is_refused(values, message):
    with pytest.raises(ProblemError, match=message):
        MemoryBudget(**values)


def test_memory_that_does_not_fit_the_cluster_is_refused():
    cluster = make_cluster([1.0, 1.0])
    with pytest.raises(ProblemError, match="3 numbers for 2 GPUs"):
        MemoryBudget(gpu_bytes=[1, 2, 3]).for_experts(cluster)
    with pytest.raises(ProblemError, match=r"GPU 1: 60 bytes of other weights and 50 bytes of KV reserve exceed"):
        MemoryBudget(gpu_bytes=[200, 100], other_weights_bytes=60, kv_reserve_bytes=50).for_experts(cluster)


def test_price_of_a_plan():
    slots = (((0, 1, 2), (0, 3), ()), ((0, 1), (1, 2), (1, 3)))
    price = copy_price(slots, 4, 2, expert_bytes=600, kv_bytes_per_token=100)
    # layer 0: expert 0 twice; layer 1: expert 1 three times
    assert (price.copies, price.total_bytes) == (3, 1800)
    assert price.bytes_per_gpu == (300 + 400, 300 + 400, 400)
    assert price.kv_tokens_per_gpu == (7, 7, 4)
    line = describe_price(price)
    assert "3 beyond one of each" in line
    assert "18 KV-cache tokens in all, at least 4 on every GPU" in line


def test_price_of_a_budget():
    price = copy_price((6, 2), 4, 10, expert_bytes=500_000_000, kv_bytes_per_token=None)
    assert (price.copies, price.total_bytes) == (40, 20_000_000_000)
    assert price.bytes_per_gpu == (15_000_000_000, 5_000_000_000)
    assert price.kv_tokens_per_gpu is None
    assert "20 GB, 15 GB on the GPU with most (give memory.kv_bytes_per_token" in describe_price(price)
    assert "none" in describe_price(copy_price((2, 2), 4, 10, 500, 100))
    with pytest.raises(ProblemError, match="expert_bytes 0"):
        copy_price((6, 2), 4, 10, 0, None)


GPT_OSS = {"num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
DEEPSEEK = {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "hidden_size": 7168}


@pytest.mark.parametrize(
    ("config", "dtype_bytes", "expected"),
    [
        (GPT_OSS, 2, 24 * 2 * 8 * 64 * 2),
        (GPT_OSS, 1, 24 * 2 * 8 * 64),
        ({"text_config": GPT_OSS}, 2, 24 * 2 * 8 * 64 * 2),
        (GPT_OSS | {"layer_types": ["sliding_attention", "full_attention"] * 12}, 2, 24 * 2 * 8 * 64 * 2),
        (GPT_OSS | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 2, 2 * 8 * 64 * 2),
        (DEEPSEEK | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 2, 61 * 576 * 2),
        ({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}, 4, 2 * 2 * 4 * 16 * 4),
        (GPT_OSS | {"full_attention_interval": 4}, 2, None),
        (GPT_OSS | {"head_dim": None}, 2, None),
        (GPT_OSS | {"num_hidden_layers": "many"}, 2, None),
        (GPT_OSS | {"layer_types": ["mamba"] * 4}, 2, None),
        ({}, 2, None),
    ],
)
def test_kv_bytes_per_token_of_configurations(config, dtype_bytes, expected):
    assert kv_bytes_per_token(config, dtype_bytes) == expected


def test_kv_bytes_need_a_size_of_numbers():
    with pytest.raises(ProblemError, match="dtype_bytes nan"):
        kv_bytes_per_token(GPT_OSS, float("nan"))
