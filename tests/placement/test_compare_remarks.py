"""What a comparison says beside its figures: remarks on plans, what rows state, digits of printed numbers."""

import json
from dataclasses import replace

import pytest

from placement.errors import ProblemError
from placement.plan import Dispatch
from placement.report import _significant
from profiler.trace_format import RoutingTrace
from tests.support.comparisons import QUICK, command, compare, write_domains


@pytest.fixture(scope="module")
def domain_trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("domains") / "domains.safetensors"
    lengths = [(name, tokens) for tokens in (30, 20) for name in ("law", "code", "verse", "news")]
    return write_domains(path, lengths)


def test_plans_of_unknown_origin_or_with_more_slots_are_remarked_on(domain_trace, tmp_path):
    settings = (*QUICK, "held_out=[sequences]")
    with RoutingTrace.open(domain_trace) as trace:
        sha256 = trace.sha256()
    _, (row,) = compare(domain_trace, *settings, "strategies=[eplb]", "slots_per_gpu=5")
    row.plan.save(tmp_path / "unknown.json")
    replace(row.plan, trace={"sha256": sha256}, dispatch=Dispatch("nearest")).save(tmp_path / "known.json")
    files = ["--plan", tmp_path / "unknown.json", "--plan", tmp_path / "known.json", "-o", tmp_path / "c.json"]
    printed = command(domain_trace, *files, *settings, "strategies=[contiguous]")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    remarks = {row["plan"]: row["remark"] for row in rows}
    more, unknown = (
        "holds 30 slots in all, the others have 24",
        "origin unknown: it may have been made from these tokens",
    )
    assert remarks == {"contiguous": None, "unknown.json": f"{unknown}; {more}", "known.json": more}
    for line in (f"unknown.json: {unknown}", f"unknown.json: {more}", f"known.json: {more}"):
        assert line in printed
    assert "known.json: origin" not in printed.replace("unknown.json", "")
    assert {(row["plan"], row["dispatch_rule"]) for row in rows} >= {("contiguous", "level"), ("known.json", "nearest")}


def test_rows_state_their_steps_and_costs(domain_trace, tmp_path):
    sizes = ("batch_sizes=[8,8192]", "judge.batches=70", "held_out=[sequences]")
    printed = command(domain_trace, "-o", tmp_path / "c.json", *QUICK, *sizes, "strategies=[eplb,balance]")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert {(row["batch"], row["repeats"]) for row in rows} == {(8, 70), (8192, 64)}
    assert {row["coefficients_source"] for row in rows} == {"assumed"}
    row = rows[0]
    assert row["c1_us"] == pytest.approx(1e6 * row["expert_bytes"] / 4.3e12)
    assert row["hidden_state_bytes"] == 4096
    assert f"workload.expert_bytes={row['expert_bytes']} is assumed" in printed
    told = [[row[f"solver_{key}"] is not None for key in ("name", "seconds", "value")] for row in rows]
    assert told == [[True, True, False]] * 2 + [[True, True, True]] * 2
    assert [row["objective"] for row in rows] == [None, None, "balance", "balance"]
    assert {row["solved_on"] for row in rows} == {"even sequences"}


def test_strategies_without_a_row_are_told(domain_trace):
    settings = (*QUICK, "held_out=[sequences]")
    assert "eplb_hierarchical: left out" in command(domain_trace, *settings, "strategies=[eplb,eplb_hierarchical]")
    assert "left out" not in command(domain_trace, *settings, "strategies=[eplb]")
    with pytest.raises(ProblemError, match=r"eplb_hierarchical.*name others"):
        command(domain_trace, *settings, "strategies=[eplb_hierarchical]")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-1e-9, "0"),
        (-0.0, "0"),
        (0.01234, "0.012"),
        (-0.5, "-0.500"),
        (3.14159, "3.14"),
        (0.9996, "1.00"),
        (12345.6, "12346"),
    ],
)
def test_significant_digits(value, shown):
    assert _significant(value) == shown
