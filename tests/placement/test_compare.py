"""Comparisons: what is held out, what the rows say, differences to the reference, tables and pictures."""

import json
from dataclasses import replace

import pytest

from conf import compose
from placement.compare_command import NO_DOMAINS
from placement.errors import ProblemError
from placement.evaluation import evaluate_routes
from placement.held_out import has_domains, splits
from placement.plots import COLOURS, MARKERS
from placement.settings import COMPARED, compare_settings
from placement.uncertainty import fastest
from profiler.trace_format import RoutingTrace
from tests.support.comparisons import QUICK, command, compare, write_domains
from tests.support.routes import make_routes, write_routes

SHORT = (*QUICK, "strategies=[contiguous,eplb,balance,step_time]")
METRICS = ("step_us", "active_ratio", "gpus_per_token", "pair_locality", "top1_transition_locality")


@pytest.fixture(scope="module")
def domain_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("domains") / "domains.safetensors"
    lengths = [(name, tokens) for tokens in (30, 20) for name in ("law", "code", "verse", "news")]
    return write_domains(path, lengths)


def metrics_of(rows):
    return {row.name: row.metrics for row in rows}


def test_domains_go_to_the_half_with_fewer_tokens(tmp_path):
    lengths = [("a", 10), ("b", 40), ("c", 25), ("d", 20), ("e", 10), ("a", 1)]  # b | c, d | then a 11 to b, e to d
    with RoutingTrace.open(write_domains(tmp_path / "t.safetensors", lengths)) as trace:
        (split,) = splits(trace, ["domains"])
        assert (split.solved_on, split.judged_on) == ("domains b, a", "domains c, d, e")
        assert split.solve_T.tolist() == [True] * 50 + [False] * 55 + [True]
        assert (split.solve_T ^ split.judge_T).all()
        both = splits(trace, ["domains", "sequences", "domains"])
        assert [split.held_out for split in both] == ["domains", "sequences"]
        assert (both[1].judge_T == trace.split_mask("odd")).all()


def test_halves_of_equal_tokens_alternate(tmp_path):
    lengths = [(name, 10) for name in "abcd"] + [("a", 10)]
    with RoutingTrace.open(write_domains(tmp_path / "t.safetensors", lengths)) as trace:
        (split,) = splits(trace, ["domains"])
        assert (split.solved_on, split.judged_on) == ("domains a, d", "domains b, c")


@pytest.mark.parametrize("names", [(None, None), ("one", "one")])
def test_fewer_than_two_domains_are_left_out(tmp_path, names):
    path = write_domains(tmp_path / "t.safetensors", [(name, 40) for name in names])
    with RoutingTrace.open(path) as trace:
        assert not has_domains(trace)
        assert [split.held_out for split in splits(trace, ["sequences", "domains"])] == ["sequences"]
        with pytest.raises(ProblemError, match="fewer than two domains"):
            splits(trace, ["domains"])


def test_prompts_without_a_domain_are_one_of_their_own(tmp_path):
    path = write_domains(tmp_path / "t.safetensors", [("law", 30), (None, 40)])
    with RoutingTrace.open(path) as trace:
        (split,) = splits(trace, ["domains"])
    assert (split.solved_on, split.judged_on) == ("domains (unnamed)", "domains law")


def test_every_strategy_is_judged_on_both(domain_trace):
    _, rows = compare(domain_trace, *QUICK)
    names = [name.replace("bounded_locality", "locality ≤1.15") for name in COMPARED if name != "eplb_hierarchical"]
    expected = [(kind, name) for kind in ("sequences", "domains") for name in names]
    assert [(row.split.held_out, row.name) for row in rows] == expected
    assert all(row.metrics is not None or row.problem for row in rows)


def test_several_nodes_have_the_hierarchical_row(domain_trace):
    _, rows = compare(domain_trace, *QUICK, "cluster=h200x8x2", "cluster.gpus_per_node=2", "held_out=[sequences]")
    assert "eplb_hierarchical" in [row.name for row in rows]


def test_rows_are_what_the_evaluator_says_with_intervals_around(domain_trace):
    cluster, rows = compare(domain_trace, *SHORT, "slots_per_gpu=+25%")
    with RoutingTrace.open(domain_trace) as trace:
        for row in rows:
            again = evaluate_routes(row.plan, trace.experts()[row.split.judge_T], cluster, (1, 8, 32), batches=60)
            for flat in row.to_rows():
                figures = again.by_batch_size[flat["batch"]]
                assert [flat[name] for name in METRICS] == [getattr(figures, name) for name in METRICS]
                assert (flat["load_mean"], flat["load_max"]) == (again.load_mean, again.load_max)
                for name in METRICS[:2]:  # of means over the very things that are resampled
                    assert flat[f"{name}_low"] <= flat[name] <= flat[f"{name}_high"]
                assert 0 <= flat["pair_locality_low"] <= flat["pair_locality_high"] <= 1
                assert 1 <= flat["load_mean_low"] <= flat["load_max_high"]


def test_copies_and_slots_are_stated(domain_trace):
    _, rows = compare(domain_trace, *SHORT, "slots_per_gpu=5", "held_out=[sequences]")
    used = {row.name: (row.slots_used, row.copies) for row in rows}
    assert used["contiguous"] == (24, 0)
    assert used["eplb"] == (30, 6)
    assert rows[1].to_rows()[0]["slots_used"] == 30


def test_differences_are_to_step_time_on_the_same_steps(domain_trace):
    _, rows = compare(domain_trace, *SHORT, "held_out=[sequences]")
    flat = {(row["plan"], row["batch"]): row for compared in rows for row in compared.to_rows()}
    for (_, size), row in flat.items():
        assert row["reference"] == "step_time"
        expected = row["step_us"] - flat["step_time", size]["step_us"]
        assert row["step_us_minus_reference"] == pytest.approx(expected, abs=1e-9)
        assert row["step_us_minus_reference_low"] <= expected + 1e-9
    own = flat["step_time", 8]
    assert [own[f"step_us_minus_reference{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


def test_without_step_time_the_fastest_is_the_reference(domain_trace):
    _, rows = compare(domain_trace, *QUICK, "strategies=[random,contiguous,balance]", "held_out=[domains]")
    flat = [row for compared in rows for row in compared.to_rows()]
    for size in (1, 8, 32):
        of_size = [row for row in flat if row["batch"] == size]
        least = min(of_size, key=lambda row: row["step_us"])
        assert {row["reference"] for row in of_size} == {least["plan"]}
        assert min(row["step_us_minus_reference"] for row in of_size) == 0
        lead = fastest(metrics_of(rows), size, compare_settings(compose("compare", QUICK)).judge)
        second = sorted(row["step_us"] for row in of_size)[1]
        assert lead.plans == (least["plan"],)
        assert lead.ahead_us == pytest.approx(second - least["step_us"])
        assert lead.interval.low <= lead.ahead_us <= lead.interval.high


def test_plans_of_equal_times_are_fastest_together(domain_trace, tmp_path):
    _, (row,) = compare(domain_trace, *QUICK, "strategies=[contiguous]", "held_out=[sequences]")
    row.plan.save(tmp_path / "same.json")
    settings = (*QUICK, "strategies=[contiguous]", "held_out=[sequences]")
    _, rows = compare(domain_trace, *settings, others=[tmp_path / "same.json"])
    lead = fastest(metrics_of(rows), 8, compare_settings(compose("compare", settings)).judge)
    assert (lead.plans, lead.next_plan, lead.ahead_us) == (("contiguous", "same.json"), None, 0.0)


def test_a_plan_that_has_seen_the_domains_is_not_judged_on_them(domain_trace, tmp_path):
    _, (row, _) = compare(domain_trace, *QUICK, "strategies=[contiguous]")
    with RoutingTrace.open(domain_trace) as trace:
        replace(row.plan, trace={"sha256": trace.sha256()}).save(tmp_path / "own.json")
    replace(row.plan, trace={"sha256": "0" * 64}).save(tmp_path / "other.json")
    files = [tmp_path / "own.json", tmp_path / "other.json"]
    _, rows = compare(domain_trace, *QUICK, "strategies=[contiguous]", others=files)
    judged = [(row.name, row.split.held_out) for row in rows if row.metrics is not None]
    assert [kind for name, kind in judged if name == "own.json"] == ["sequences"]
    assert [kind for name, kind in judged if name == "other.json"] == ["sequences", "domains"]
    (problem,) = (row.problem for row in rows if row.problem)
    assert "nothing of these domains is held out" in problem
    assert [flat["solved_on"] for row in rows[:2] for flat in row.to_rows()] == ["even sequences"] * 3 + [None] * 3


def test_names_that_mean_something_to_the_picture_are_shown(domain_trace, tmp_path):
    _, (row,) = compare(domain_trace, *QUICK, "strategies=[contiguous]", "held_out=[sequences]")
    plan, picture = tmp_path / "_$a[b]$.json", tmp_path / "c.svg"
    row.plan.save(plan)
    settings = (*QUICK, "strategies=[contiguous]", "held_out=[sequences]")
    printed = command(domain_trace, "--plan", plan, "--plot", picture, *settings)
    assert "_$a[b]$.json" in printed
    assert "_$a[b]$.json" in picture.read_text()


def test_large_steps_of_prefill(domain_trace):
    _, rows = compare(domain_trace, *SHORT, "workload=prefill", "batch_sizes=[4096]", "held_out=[sequences]")
    assert all(list(row.metrics.by_batch_size) == [4096] for row in rows)
    flat = rows[0].to_rows()[0]
    assert flat["step_us_low"] <= flat["step_us"] <= flat["step_us_high"]


def test_sizes_come_from_the_workload_unless_given():
    settings = compare_settings(compose("compare", ["workload=mixed"]))
    assert (settings.workload.batch_sizes, settings.workload.shares) == ((1, 8, 32, 4096), (3, 3, 3, 1))
    settings = compare_settings(compose("compare", ["workload=mixed", "batch_sizes=[2,4]"]))
    assert (settings.workload.batch_sizes, settings.workload.shares) == ((2, 4), None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategies=[magic]", "strategies"),
        ("strategies=[]", "strategies"),
        ("strategies=eplb", "strategies 'eplb'"),
        ("held_out=[prompts]", "held_out"),
        ("judge.resamples=10", "judge.resamples 10"),
        ("judge.batches=0", "judge.batches 0"),
        ("batch_sizes=[0]", "batch_sizes"),
        ("max_load=0.5", "max_load 0.5"),
        ("max_load=null", "max_load null"),
    ],
)
def test_bad_settings_name_the_value(override, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        compare_settings(compose("compare", [override]))


def test_tables_say_what_was_held_out_and_which_is_fastest(domain_trace, tmp_path):
    files = ["-o", tmp_path / "c.json", "--plot", tmp_path / "c.svg"]
    printed = command(domain_trace, *files, *SHORT)
    assert "solved on even sequences (100 tokens), judged on odd sequences (100 tokens)" in printed
    assert "solved on domains" in printed
    for size in (1, 8, 32):
        assert printed.count(f"fastest at B={size}: ") == 2
    assert printed.count("mix of these: ") == 2
    assert printed.count("from these tokens only, not other prompts") == 3
    assert "-0 " not in printed
    assert "±" in printed.split("fastest")[0]
    assert max(map(len, printed.split("Held-out")[1].splitlines()[1:-2])) <= 110
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert {row["held_out"] for row in rows} == {"sequences", "domains"}
    assert not any(isinstance(value, dict | list) for row in rows for value in row.values())
    assert len({tuple(row) for row in rows}) == 1
    picture = (tmp_path / "c.svg").read_text()
    assert picture.count("<svg") == 1
    for words in ("held-out sequences", "held-out domains", "step_time", "tokens per step"):
        assert words in picture


def test_a_narrow_console_has_no_intervals_and_missing_domains_are_told(small_trace):
    printed = command(small_trace, *SHORT, width=60)
    assert "±" not in printed.split("fastest")[0]
    assert NO_DOMAINS in printed
    assert NO_DOMAINS not in command(small_trace, *SHORT, "held_out=[sequences]")


def test_no_plan_at_all_is_refused(tmp_path):
    path = write_routes(tmp_path / "skewed.safetensors", make_routes(2, 400, 2, 8, 1), 8)
    settings = ("cluster=h200x8", "max_load=1.0", "strategies=[bounded_locality]", "judge.batches=20")
    with pytest.raises(ProblemError, match=r"no plan results; locality ≤1: .*the least load found"):
        command(path, "-o", tmp_path / "c.json", "--plot", tmp_path / "c.png", *settings)
    assert not list(tmp_path.glob("c.*"))


def test_every_plan_looks_different():
    looks = {(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n in range(len(COLOURS) * len(MARKERS))}
    assert len(looks) == len(COLOURS) * len(MARKERS)
