"""``python -m placement``: plans, comparisons, evaluations, and one-line refusals that leave no file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from placement.__main__ import main
from placement.plan import PlacementPlan
from placement.strategies.contiguous import contiguous_plan
from profiler.trace_format import RoutingTrace
from tests.support.routes import make_routes, write_routes

ROOT = Path(__file__).parents[2]
QUICK = ["judge.batches=50", "solver.search_rounds=20"]


def run(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "placement", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_solve_writes_a_plan_that_says_what_it_is(small_trace, tmp_path):
    output = tmp_path / "plan.json"
    finished = run("solve", "--trace", small_trace, "-o", output, "cluster=h200x2", "objective=locality", *QUICK)
    assert finished.returncode == 0, finished.stderr
    assert "proven optimal" in finished.stdout
    assert "contiguous" in finished.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    plan = PlacementPlan.load(output)
    assert (plan.model, plan.num_gpus, plan.num_layers, plan.strategy) == ("test-model", 2, 4, "step_time")
    assert plan.dispatch.split_above_tokens == 64
    assert plan.solver["bound"] == plan.solver["value"]
    assert plan.solver["gap"] == 0
    assert plan.cluster["coefficients"][0]["expert_bytes"] == 1000
    with RoutingTrace.open(small_trace) as trace:
        assert plan.trace == {"sha256": trace.sha256(), "tokens": 800}
    step_us = plan.predicted["step_us"]
    assert set(step_us) == {"plan", "contiguous", "eplb"}
    assert set(step_us["plan"]) == {"1", "8", "32"}
    locality = plan.predicted["pair_locality"]
    assert locality["plan"]["1"] > locality["contiguous"]["1"]


@pytest.mark.parametrize(
    "settings",
    [
        ["strategy=eplb", "slots_per_gpu=3"],
        ["strategy=contiguous", "workload=prefill", "workload.batch_sizes=[16]"],
        ["objective=balance", "slots_per_gpu=[4,3,2,2]", "workload.exchange=alltoall"],
        [
            "objective=locality",
            "objective.max_load=1.4",
            "slots_per_gpu=3",
            "dispatch.split_above_tokens=null",
            "workload.exchange=coherent",
        ],
    ],
)
def test_settings_reach_the_plan(small_trace, tmp_path, settings):
    output = tmp_path / "plan.json"
    assert main(["solve", "--trace", str(small_trace), "-o", str(output), *settings, *QUICK]) == 0
    plan = PlacementPlan.load(output)
    assert plan.num_gpus == 4
    assert plan.strategy == ("step_time" if not settings[0].startswith("strategy") else settings[0].split("=")[1])


def test_compare_and_evaluate_agree(small_trace, tmp_path):
    plan, compared, evaluated = tmp_path / "plan.json", tmp_path / "compare.json", tmp_path / "evaluate.json"
    trace = ["--trace", str(small_trace)]
    assert main(["solve", *trace, "-o", str(plan), "cluster=h200x2", *QUICK]) == 0
    plot = tmp_path / "plot.png"
    flags = ["-o", str(compared), "--plan", str(plan), "--plot", str(plot)]
    strategies = "strategies=[contiguous,eplb,locality,bounded_locality,balance,step_time]"
    assert main(["compare", *trace, *flags, "cluster=h200x2", "max_load=1.3", strategies, *QUICK]) == 0
    assert main(["evaluate", *trace, "--plan", str(plan), "-o", str(evaluated), "judge.batches=50"]) == 0
    document = json.loads(compared.read_text())
    assert list(document) == ["command", "commit", "device", "versions", "rows"]
    assert not any(isinstance(value, dict | list) for row in document["rows"] for value in row.values())
    rows = {(row["plan"], row["batch"]): row for row in document["rows"]}
    names = ["contiguous", "eplb", "locality", "locality ≤1.3", "balance", "step_time", "plan.json"]
    assert list(rows) == [(name, size) for name in names for size in (1, 8, 32)]
    evaluation = json.loads(evaluated.read_text())
    own = rows["plan.json", 8]
    shared = ("plan", "trace_sha256", "cluster", "exchange", "seed", "expert_bytes", "c1_us", "coefficients_source")
    assert [evaluation[key] for key in shared] == [own[key] for key in shared]
    assert (evaluation["split"], evaluation["batches"]) == ("odd", 50)
    assert evaluation["repeats"]["8"] == own["repeats"] == 50
    metrics = evaluation["metrics"]
    for size in (1, 8, 32):
        row, same = rows["plan.json", size], rows["step_time", size]
        for name, value in metrics.items():
            assert row[name] == same[name] == (value[str(size)] if isinstance(value, dict) else value)
    assert rows["balance", 8]["load_mean"] < rows["locality", 8]["load_mean"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_evaluate_says_where_the_size_of_an_expert_comes_from(small_trace, tmp_path, capsys):
    bare = write_routes(tmp_path / "bare.safetensors", make_routes(0, 800, 4, 8, 2), 8)
    solved, plan = tmp_path / "solved.json", contiguous_plan("test-model", 8, 2, [0, 1, 2, 3], 2)
    plan.save(tmp_path / "plan.json")
    assert main(["solve", "--trace", str(small_trace), "-o", str(solved), "cluster=h200x2", *QUICK]) == 0
    capsys.readouterr()
    for trace, path, note in (
        (bare, tmp_path / "plan.json", "expert_bytes: 9437184 is assumed, from the setting"),
        (bare, solved, "expert_bytes: 1000 is assumed, from the plan's cluster"),
        (small_trace, solved, None),
    ):
        command = ["evaluate", "--trace", str(trace), "--plan", str(path), "cluster=h200x2", "judge.batches=20"]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert note in printed if note else "is assumed" not in printed


def test_compare_says_which_strategy_found_nothing(tmp_path, capsys):
    trace = write_routes(tmp_path / "skewed.safetensors", make_routes(2, 400, 2, 8, 1), 8)
    output = tmp_path / "compare.json"
    assert main(["compare", "--trace", str(trace), "-o", str(output), "cluster=h200x8", "max_load=1.0", *QUICK]) == 0
    (row,) = [row for row in json.loads(output.read_text())["rows"] if row["plan"] == "locality ≤1"]
    assert "the least load found" in row["problem"]
    assert row["batch"] is None
    assert "the least load found" in capsys.readouterr().out


def test_plans_of_one_name_keep_their_rows(small_trace, tmp_path, capsys):
    plans = [tmp_path / folder / "[/plan].json" for folder in ("a", "b")]
    command = ["compare", "--trace", str(small_trace), "cluster=h200x2", "strategies=[contiguous]", *QUICK]
    for plan in plans:
        plan.parent.mkdir(parents=True)
        assert main(["solve", "--trace", str(small_trace), "-o", str(plan), "cluster=h200x2", *QUICK]) == 0
        command += ["--plan", str(plan)]
    output = tmp_path / "compare.json"
    assert main([*command, "-o", str(output)]) == 0
    names = {row["plan"] for row in json.loads(output.read_text())["rows"]}
    assert {str(plan) for plan in plans} < names


def test_evaluate_checks_sizes(small_trace, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    contiguous_plan("m", 8, 2, range(4), 4).save(plan)
    command = ["evaluate", "--trace", str(small_trace), "--plan", str(plan), "cluster=h200x4"]
    assert main([*command, "expert_bytes=abc"]) == 2
    assert "expert_bytes 'abc'" in capsys.readouterr().err
    assert main([*command, "judge.batches=2"]) == 0


def test_evaluate_on_another_cluster(small_trace, tmp_path):
    plan, near, far = tmp_path / "plan.json", tmp_path / "near.json", tmp_path / "far.json"
    trace = ["--trace", str(small_trace)]
    assert main(["solve", *trace, "-o", str(plan), "cluster=h200x2", *QUICK]) == 0
    assert main(["evaluate", *trace, "--plan", str(plan), "-o", str(near), "judge.batches=50"]) == 0
    command = ["evaluate", *trace, "--plan", str(plan), "-o", str(far), "cluster=cpu2", "judge.batches=50"]
    assert main(command) == 0
    near_metrics, far_metrics = (json.loads(path.read_text())["metrics"] for path in (near, far))
    assert near_metrics["active_ratio"] == far_metrics["active_ratio"]
    assert near_metrics["step_us"]["1"] < far_metrics["step_us"]["1"]


def test_a_cluster_file(small_trace, tmp_path):
    text = (ROOT / "conf" / "cluster" / "cpu2.yaml").read_text().replace("4.0e+9", "[64000.0, 12000.0]")
    cluster = tmp_path / "own.yaml"
    cluster.write_text(text)
    output = tmp_path / "plan.json"
    command = ["solve", "--trace", str(small_trace), "-o", str(output), f"cluster={cluster}", *QUICK]
    assert main([*command, "slots_per_gpu=4"]) == 2
    for asked, slots in (("null", [5, 3]), ("[6,2]", [6, 2]), ("fill", [8, 3]), ("+25%", [7, 3])):
        assert main([*command, f"slots_per_gpu={asked}"]) == 0
        assert [len(held) for held in PlacementPlan.load(output).slots[0]] == slots


def test_memory_of_gpus_sets_the_slots_and_copies_have_a_price(small_trace, tmp_path, capsys):
    """An expert takes 1000 bytes in each of 4 layers: 20,000 of 40,000 bytes hold 5 slots, 2 GPUs 10 for 8 experts."""
    output = tmp_path / "plan.json"
    command = ["solve", "--trace", str(small_trace), "-o", str(output), "cluster=cpu2", *QUICK, "slots_per_gpu=fill"]
    memory = ["memory.gpu_bytes=40000", "memory.other_weights_bytes=[5000,5000]", "memory.kv_reserve_bytes=15000"]
    assert main([*command, *memory, "memory.kv_bytes_per_token=100"]) == 0
    assert [len(held) for held in PlacementPlan.load(output).slots[0]] == [5, 5]
    assert "memory for 80 KV-cache tokens in all" in capsys.readouterr().out
    assert main([*command, "memory.kv_reserve_bytes=15000"]) == 2
    assert "give gpu_bytes as well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cluster=moon"], "cluster/moon"),
        (["cluster=missing.yaml"], "no such file"),
        (["strategy=magic"], "strategy/magic"),
        (["objective=locality", "objective.max_load=0.5"], "max_load 0.5"),
        (["objective.max_load=1.5"], "takes no max_load"),
        (["objective=locality", "objective.max_load=1.0", "objective.pairs=top1"], "the least load found"),
        (["objective.novelty=1"], "novelty"),
        (["+objective.novelty=1"], "novelty"),
        (["slots_per_gpu=1"], "too few for 8 experts"),
        (["slots_per_gpu=many"], "slots_per_gpu 'many'"),
        (["cluster.expert_memory_bytes=100"], "room for 0 slots"),
        (["workload.exchange=telepathy"], "exchange 'telepathy'"),
        (["workload.batch_sizes=[]"], "batch_sizes"),
        (["workload.hidden_state_bytes=none"], "hidden_state_bytes"),
        (["solver.time_limit_s=0"], "time_limit_s 0"),
        (["model=7"], "model 7"),
        (["cluster.nodes=1000000000000"], "from 1 to 1024"),
        (["+novelty=1"], "novelty"),
        (["judge.batches=0"], "judge.batches 0"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(small_trace, tmp_path, capsys, arguments, message):
    output = tmp_path / "plan.json"
    assert main(["solve", "--trace", str(small_trace), "-o", str(output), *QUICK, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_one_line_and_exit_2(small_trace, tmp_path):
    output = tmp_path / "plan.json"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(small_trace.read_bytes()[:500])
    for arguments, message in [
        (["solve", "--trace", "missing.safetensors", "-o", output], "missing.safetensors"),
        (["solve", "--trace", broken, "-o", output], "broken.safetensors"),
        (["solve", "--trace", small_trace, "-o", tmp_path / "no" / "plan.json"], "does not exist or cannot be written"),
        (["solve", "--trace", broken, "-o", broken], "is named twice"),
        (["compare", "--trace", small_trace, "--plot", tmp_path / "plot.xyz"], "ends in .png, .svg, .pdf"),
        (["compare", "--trace", small_trace, "-o", tmp_path / "a.png", "--plot", tmp_path / "a.png"], "named twice"),
        (["compare", "--trace", small_trace, "max_load=null"], "max_load null"),
        (["evaluate", "--trace", small_trace, "--plan", broken, "~split"], "unrecognized"),
        (["evaluate", "--trace", small_trace, "--plan", broken], "broken.safetensors"),
        (["compare", "--trace", small_trace, "--plan", tmp_path / "none.json"], "none.json"),
    ]:
        finished = run(*arguments)
        assert finished.returncode == 2
        assert message in finished.stderr
        assert "Traceback" not in finished.stderr
        assert len(finished.stderr.strip().splitlines()) == 1 or finished.stderr.startswith("usage")
    assert [file.name for file in tmp_path.iterdir()] == ["broken.safetensors"]


@pytest.mark.parametrize("verb", ["solve", "compare", "evaluate"])
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert f"python -m placement {verb} --" in capsys.readouterr().out


def test_a_plan_is_solved_where_torch_is_not_installed(small_trace, tmp_path):
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    call = "from placement.__main__ import main; sys.exit(main(sys.argv[1:]))"
    output = tmp_path / "plan.json"
    arguments = ["solve", "--trace", str(small_trace), "-o", str(output), "cluster=cpu2", *QUICK]
    command = [sys.executable, "-c", blocked + call, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert PlacementPlan.load(output).num_gpus == 2
