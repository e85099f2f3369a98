"""``placement solve`` beyond a trace and its defaults: step time, running plans, counts, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.__main__ import main
from placement.migration import num_moves
from placement.plan import PlacementPlan
from profiler.routing_counts import RoutingCounts
from tests.support.routes import make_routes, write_routes

QUICK = ["judge.batches=50", "solver.search_rounds=20", "cluster=h200x2"]


@pytest.fixture
def counts_file(tmp_path):
    path = tmp_path / "counts.safetensors"
    loads = np.array([[600, 560, 120, 120, 20, 10, 10, 10]] * 2)
    RoutingCounts(loads, "some/model", (3, 5)).save(path)
    return path


def test_the_default_minimises_step_time(small_trace, tmp_path, capsys):
    output = tmp_path / "plan.json"
    assert main(["solve", "--trace", str(small_trace), "-o", str(output), "slots_per_gpu=+25%", *QUICK]) == 0
    plan = PlacementPlan.load(output)
    assert (plan.strategy, plan.objective["name"]) == ("step_time", "step_time")
    assert plan.solver["bound"] <= plan.solver["value"]
    step_us = plan.predicted["step_us"]
    assert all(step_us["plan"][size] <= step_us["contiguous"][size] * 1.02 for size in ("1", "8", "32"))
    printed = capsys.readouterr().out
    assert "step time" in printed
    assert "bound" in printed


def test_a_running_plan_is_left_by_at_most_the_moves_allowed(small_trace, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert (
        main(["solve", "--trace", str(small_trace), "-o", str(first), "strategy=eplb", "slots_per_gpu=5", *QUICK]) == 0
    )
    other = write_routes(tmp_path / "other.safetensors", make_routes(9, 800, 4, 8, 2), 8, expert_bytes=1000)
    arguments = ["solve", "--trace", str(other), "-o", str(second), "--running", str(first), "slots_per_gpu=5"]
    assert main([*arguments, "max_moves=3", *QUICK]) == 0
    before, after = PlacementPlan.load(first), PlacementPlan.load(second)
    moved = num_moves(before.slots, after.slots)
    assert moved <= 3
    assert after.migration["num_moves"] == moved
    assert set(after.predicted["step_us"]) == {"plan", "running", "contiguous", "eplb"}
    assert f"{moved} expert copies move" in capsys.readouterr().out


def test_without_a_limit_gpus_are_renamed_so_that_few_copies_move(small_trace, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    solve = ["solve", "--trace", str(small_trace), "strategy=eplb", "slots_per_gpu=5", *QUICK]
    assert main([*solve, "-o", str(first)]) == 0
    plan = PlacementPlan.load(first)
    swapped = replace(plan, slots=tuple(layer[::-1] for layer in plan.slots))
    swapped.save(first)
    assert main([*solve, "-o", str(second), "--running", str(first)]) == 0
    assert PlacementPlan.load(second).slots == swapped.slots
    assert PlacementPlan.load(second).migration["num_moves"] == 0


@pytest.mark.parametrize("settings", [["strategy=eplb"], ["objective=balance"], ["objective=locality"]])
def test_strategies_that_cannot_limit_moves_say_so(small_trace, tmp_path, capsys, settings):
    first = tmp_path / "first.json"
    assert main(["solve", "--trace", str(small_trace), "-o", str(first), "strategy=eplb", *QUICK]) == 0
    capsys.readouterr()
    arguments = ["solve", "--trace", str(small_trace), "-o", str(tmp_path / "second.json"), "--running", str(first)]
    assert main([*arguments, "max_moves=2", *settings, *QUICK]) == 2
    assert "max_moves 2" in capsys.readouterr().err


def test_a_running_plan_of_another_model_is_refused(small_trace, tmp_path, capsys):
    other = write_routes(tmp_path / "other.safetensors", make_routes(0, 100, 4, 6, 2), 6)
    first = tmp_path / "first.json"
    assert main(["solve", "--trace", str(other), "-o", str(first), "strategy=eplb", *QUICK]) == 0
    capsys.readouterr()
    arguments = ["solve", "--trace", str(small_trace), "-o", str(tmp_path / "second.json"), "--running", str(first)]
    assert main([*arguments, *QUICK]) == 2
    assert "experts per layer" in capsys.readouterr().err
    assert not (tmp_path / "second.json").exists()


def test_moves_without_a_running_plan_are_refused(small_trace, tmp_path, capsys):
    arguments = ["solve", "--trace", str(small_trace), "-o", str(tmp_path / "plan.json"), "max_moves=3", *QUICK]
    assert main(arguments) == 2
    assert "max_moves" in capsys.readouterr().err


def test_counts_are_balanced(counts_file, tmp_path, capsys):
    output = tmp_path / "plan.json"
    arguments = ["solve", "--trace", str(counts_file), "-o", str(output), "objective=balance", "top_k=2"]
    assert main([*arguments, "cluster=h200x8", "slots_per_gpu=2"]) == 0
    plan = PlacementPlan.load(output)
    assert plan.layer_ids == (3, 5)
    assert plan.predicted["load_max"]["plan"] * 1450 / 8 == pytest.approx(590 / 3)
    assert plan.solver["optimal"]
    assert "proven optimal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["top_k=2"], "objective=balance"),
        (["top_k=2", "objective=locality"], "objective=balance"),
        (["objective=balance"], "top_k="),
        (["objective=balance", "top_k=2", "objective.pairs=top1"], "first choices"),
        (["objective=balance", "top_k=2", "max_moves=3"], "max_moves"),
        (["objective=balance", "top_k=2", "strategy=exflow"], "counts alone"),
        (["objective=balance", "top_k=2", "strategy=moetuner"], "counts alone"),
    ],
)
def test_what_counts_cannot_do_is_said(counts_file, tmp_path, capsys, settings, said):
    output = tmp_path / "plan.json"
    assert main(["solve", "--trace", str(counts_file), "-o", str(output), "cluster=h200x2", *settings]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_memory_is_filled_and_its_price_printed(small_trace, tmp_path, capsys):
    output = tmp_path / "plan.json"
    memory = ["memory.gpu_bytes=30000", "memory.kv_reserve_bytes=6000", "memory.kv_bytes_per_token=100"]
    arguments = ["solve", "--trace", str(small_trace), "-o", str(output), "slots_per_gpu=fill", *memory, *QUICK]
    assert main([*arguments, "strategy=eplb"]) == 0
    plan = PlacementPlan.load(output)
    assert [len(gpu) for gpu in plan.slots[0]] == [6, 6]  # 24,000 bytes hold 6 slots of 1,000 bytes in 4 layers
    printed = capsys.readouterr().out
    assert "KV" in printed
    assert "tokens" in printed


def test_memory_that_is_too_small_is_refused(small_trace, tmp_path, capsys):
    output = tmp_path / "plan.json"
    arguments = ["solve", "--trace", str(small_trace), "-o", str(output), "memory.gpu_bytes=10000", *QUICK]
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not output.exists()
