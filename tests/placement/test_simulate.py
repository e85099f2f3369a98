"""Simulated clusters: presets, figures against the evaluator's, and what is refused."""

import argparse
import json
from io import StringIO

import pytest
from rich.console import Console

from conf import choices, compose
from placement.cluster import Cluster
from placement.errors import PlanError, ProblemError
from placement.evaluation import evaluate
from placement.plan import PlacementPlan
from placement.simulate import memory_bytes, simulate, simulate_settings
from placement.simulate_command import add_arguments, run
from profiler.errors import InputError
from profiler.trace_format import RoutingTrace
from tests.support.routes import make_routes, write_routes

SIZES = {
    "h200x1": (1, 1),
    "h200x2": (1, 2),
    "h200x4": (1, 4),
    "h200x8": (1, 8),
    "h200x8x2": (2, 8),
    "h100x8": (1, 8),
    "h100x8x2": (2, 8),
    "gb200nvl72": (1, 72),
    "h800x8x40": (40, 8),
    "cpu2": (1, 2),
    "cpu4": (1, 4),
}
SMALL = ("cluster=h200x8x2", "strategies=[contiguous,eplb]", "batch_sizes=[1,40]", "judge.batches=20")


def settings_of(*overrides):
    return simulate_settings(compose("simulate", [*SMALL, *overrides]))


def simulate_small(path, *overrides, others=()):
    with RoutingTrace.open(path) as trace:
        return simulate(trace, settings_of(*overrides), others, lambda line: None)


def test_every_preset_is_known():
    assert set(choices("cluster")) >= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_presets_compose_and_hold_together(name):
    cluster = Cluster.from_dict(compose("simulate", [f"cluster={name}"])["cluster"])
    assert (cluster.name, (cluster.nodes, cluster.gpus_per_node)) == (name, SIZES[name])
    assert cluster.coefficients == ()
    assert cluster.same_gpu.bytes_per_s >= cluster.intra_node.bytes_per_s > cluster.inter_node.bytes_per_s
    assert cluster.same_gpu.latency_s < cluster.intra_node.latency_s < cluster.inter_node.latency_s
    assert cluster.coefficients_for(10**7, 4096).c1_us.source == "assumed"


def test_default_strategies_exist():
    assert simulate_settings(compose("simulate")).strategies[:2] == ("contiguous", "eplb")


def test_rows_are_what_the_evaluator_finds(small_trace):
    cluster, rows = simulate_small(small_trace, "slots_per_gpu=1")
    assert [row.name for row in rows] == ["contiguous", "eplb"]
    with RoutingTrace.open(small_trace) as trace:
        for row in rows:
            assert row.plan.num_gpus == 16
            assert row.metrics == evaluate(row.plan, trace, cluster, batch_sizes=(1, 40), batches=20)
    flat = [facts for row in rows for facts in row.to_rows(1000)]
    assert [(facts["plan"], facts["batch"]) for facts in flat] == [
        ("contiguous", 1),
        ("contiguous", 40),
        ("eplb", 1),
        ("eplb", 40),
    ]
    assert all(facts["memory_bytes_max"] == 4000 for facts in flat)  # one slot in 4 layers
    assert flat[0]["memory_bytes_mean"] == 2000  # 8 experts on 16 GPUs
    assert flat[2]["memory_bytes_mean"] == 4000  # copies everywhere
    assert all(facts["nvlink_bytes"] > 0 and facts["network_bytes"] > 0 for facts in flat if facts["batch"] == 40)


def test_memory_counts_every_slot():
    assert memory_bytes((((0, 1), ()), ((0,), (1,))), 10) == (30, 10)


def test_more_gpus_than_experts_need_slots(small_trace):
    with pytest.raises(ProblemError, match="16 GPUs for 8 experts: give slots_per_gpu=1"):
        simulate_small(small_trace)


def test_experts_that_do_not_fit_are_refused(small_trace):
    with pytest.raises(InputError, match=r"cluster\.expert_memory_bytes"):
        simulate_small(small_trace, "slots_per_gpu=8", "cluster.expert_memory_bytes=20000")


@pytest.mark.parametrize("override", ["strategies=[contiguous,nothing]", "strategies=eplb", "strategies=[[1]]"])
def test_strategies_that_are_none(override):
    with pytest.raises(ProblemError, match="expected"):
        settings_of(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("exchange=sometimes", "exchange 'sometimes'"),
        ("dispatch.rule=random", "dispatch rule 'random'"),
        ("batch_sizes=[0]", "batch_sizes"),
        ("judge.batches=0", "judge.batches"),
    ],
)
def test_settings_out_of_range(override, message):
    with pytest.raises(InputError, match=message):
        settings_of(override)


def test_plans_made_before(small_trace, tmp_path):
    slots = tuple(tuple((expert % 8,) for expert in range(16)) for _ in range(4))
    plan = PlacementPlan("test-model", 8, 2, (0, 1, 2, 3), slots)
    plan.save(tmp_path / "plan.json")
    _, rows = simulate_small(small_trace, "strategies=[]", "exchange=coherent", others=[tmp_path / "plan.json"])
    assert [row.name for row in rows] == [str(tmp_path / "plan.json")]
    assert rows[0].plan.workload.exchange == "coherent"
    assert rows[0].to_rows(1000)[0]["solver_seconds"] is None
    with pytest.raises(ProblemError, match="is for 16 GPUs, cluster h200x4 has 4"):
        simulate_small(small_trace, "strategies=[]", "cluster=h200x4", others=[tmp_path / "plan.json"])
    other = write_routes(tmp_path / "other.safetensors", make_routes(0, 80, 3, 8, 2), 8)
    with pytest.raises(PlanError, match="the plan is for"):
        simulate_small(other, "strategies=[]", others=[tmp_path / "plan.json"])


def test_nothing_to_simulate_is_refused(small_trace):
    with pytest.raises(ProblemError, match=r"strategies \[\] and no plan"):
        simulate_small(small_trace, "strategies=[]")
    with pytest.raises(ProblemError, match=r"no plan results; step_time: .*dispatch\.rule level"):
        simulate_small(small_trace, "strategies=[step_time]", "slots_per_gpu=1", "dispatch.rule=nearest")


def test_command_prints_and_writes(small_trace, tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    flags = parser.parse_args(["--trace", str(small_trace), "-o", str(tmp_path / "rows.json")])
    text = StringIO()
    console = Console(file=text, width=120)
    run(flags, compose("simulate", [*SMALL, "slots_per_gpu=1", "exchange=allreduce"]), console, lambda line: None)
    assert "contiguous" in text.getvalue()
    assert "network" in text.getvalue()
    document = json.loads((tmp_path / "rows.json").read_text())
    rows = document["rows"]
    assert len(rows) == 4
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())
    assert {row["expert_bytes"] for row in rows} == {1000}
    # A ring over 2 nodes of 8: 14 of 16 hops within a node, in each of 4 layers.
    ring = 2 * 15 / 16 * 4096 * rows[0]["batch"] * 4
    assert (rows[0]["nvlink_bytes"], rows[0]["network_bytes"]) == pytest.approx((14 * ring, 2 * ring))
