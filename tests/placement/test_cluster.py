"""Clusters: presets, coefficients, slot budgets, refusal of what makes no sense."""

import pytest

from conf import choices, compose
from placement.cluster import Cluster
from placement.errors import ClusterError, ProblemError
from placement.memory import slot_budget


def preset(name):
    return Cluster.from_dict(compose("solve", [f"cluster={name}"])["cluster"])


@pytest.mark.parametrize("name", choices("cluster"))
def test_presets_load_and_round_trip(name):
    cluster = preset(name)
    assert cluster.name == name
    assert Cluster.from_dict(cluster.to_dict()) == cluster


def test_coefficients_follow_from_bytes_and_flops_until_measured():
    document = preset("h200x2").to_dict() | {"hbm_bytes_per_s": 2e12, "flop_per_s": 5e14, "launch_us": 7.0}
    assumed = Cluster.from_dict(document).coefficients_for(4_000_000, 4096)
    assert (assumed.c0_us.value, assumed.c1_us.value, assumed.c2_us.value) == (7.0, 2.0, 0.008)
    assert assumed.c1_us.source == "assumed"
    measured = {
        name: {"value": value, "source": "measured"} for name, value in (("c0_us", 9), ("c1_us", 3), ("c2_us", 1))
    }
    document["coefficients"] = [{"expert_bytes": 4_000_000, "hidden_state_bytes": 4096} | measured]
    cluster = Cluster.from_dict(document)
    assert cluster.coefficients_for(4_000_000, 4096).c1_us.value == 3
    assert cluster.coefficients_for(8_000_000, 4096).c1_us.source == "assumed"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nodes", 0, "nodes 0"),
        ("gpus_per_node", 1.5, "gpus_per_node 1.5"),
        ("expert_memory_bytes", [1e9, 1e9, 1e9], "3 numbers for 2 GPUs"),
        ("expert_memory_bytes", -1, "expert_memory_bytes -1"),
        ("expert_memory_bytes", "a lot", "expert_memory_bytes 'a lot'"),
        ("hbm_bytes_per_s", float("inf"), "hbm_bytes_per_s inf"),
        ("launch_us", None, "launch_us None"),
        ("intra_node", 3, "malformed"),
        ("intra_node", {"latency_s": 0.0}, "'bytes_per_s' is missing"),
        ("coefficients", [{"expert_bytes": 1}], "'c0_us' is missing"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(key, value, message):
    document = preset("h200x2").to_dict() | {key: value}
    with pytest.raises(ClusterError) as caught:
        Cluster.from_dict(document)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_slot_budgets():
    cluster = preset("h200x4")
    assert slot_budget(cluster, 32, 24, None, None) == (8, 8, 8, 8)
    assert slot_budget(cluster, 30, 24, None, None) == (8, 8, 7, 7)
    assert slot_budget(cluster, 32, 24, 10, None) == (10, 10, 10, 10)
    assert slot_budget(cluster, 32, 24, [16, 8, 4, 4], None) == (16, 8, 4, 4)
    with pytest.raises(ProblemError, match="list of 4"):
        slot_budget(cluster, 32, 24, [16, 16], None)


def test_memory_bounds_the_slots():
    uneven = Cluster.from_dict(preset("h200x2").to_dict() | {"expert_memory_bytes": [800.0, 400.0]})
    assert slot_budget(uneven, 6, 10, [4, 2], expert_bytes=20) == (4, 2)
    with pytest.raises(ProblemError, match=r"GPU 1 has 400 bytes .* room for 2 slots; 3 slots in 10 layers need 600"):
        slot_budget(uneven, 6, 10, 3, expert_bytes=20)
