"""The verbs merge, split, sample and info from the command line, and what degenerate traces give."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.__main__ import main
from profiler.trace_format import RoutingTrace
from tests.support.trace_files import save_trace, token_records

DOMAINS = ["code", "law", "code", "law", "code", "art"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a trace of six sequences, 4 tokens each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    save_trace(Path("t.safetensors"), dict.fromkeys(range(6), 4), domains=DOMAINS, metadata={"source": "a [lab]"})
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """What a command prints."""
    assert main(command.split()) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The one line with which a command ends."""
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_split_by_domain_and_merge_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "split t.safetensors --by domain -o parts")
    assert sorted(path.name for path in Path("parts").iterdir()) == [
        "t-art.safetensors",
        "t-code.safetensors",
        "t-law.safetensors",
    ]
    assert "note: parts/t-code.safetensors has no odd sequences: plans are solved on even ones" in shown
    assert "note: parts/t-law.safetensors has no even sequences" in shown
    shown = told(
        capsys, "merge parts/t-code.safetensors parts/t-law.safetensors parts/t-art.safetensors -o m.safetensors"
    )
    assert "note" not in shown
    assert sorted(token_records(Path("m.safetensors"))) == sorted(token_records(Path("t.safetensors")))
    shown = told(capsys, "split t.safetensors --by domain --renumber -o anew")
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("note")] == ["anew/t-art.safetensors"]


def test_split_by_shares_and_phase(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, "split t.safetensors --by sequence --parts 0.5,0.3,0.2 --seed 7 -o parts")
    told(capsys, "split t.safetensors --by sequence --parts 0.5,0.3,0.2 --seed 7 -o again")
    sizes = []
    for number in (1, 2, 3):
        paths = [Path(name) / f"t-part{number}.safetensors" for name in ("parts", "again")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        sizes.append(RoutingTrace.open(paths[0]).num_sequences)
    assert sizes == [3, 2, 1]
    told(capsys, "split t.safetensors --by phase -o phases")
    for phase, name in enumerate(("prefill", "decode")):
        with RoutingTrace.open(Path("phases") / f"t-{name}.safetensors") as trace:
            assert trace.decode().tolist() == [phase] * 12
            assert trace.num_sequences == 6


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ("--tokens 9", 12),
        ("--tokens 9 --single-tokens", 9),
        ("--sequences 2", 8),
        ("--per-domain 1 --renumber", 12),
    ],
)
def test_sample(folder: Path, capsys: pytest.CaptureFixture[str], flags: str, tokens: int) -> None:
    for name in ("s", "again"):
        told(capsys, f"sample t.safetensors {flags} --seed 3 -o {name}.safetensors")
    assert Path("s.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
    with RoutingTrace.open("s.safetensors") as trace:
        assert trace.num_tokens == tokens
        assert trace.metadata["source"] == "a [lab]"


def test_info_tells_what_is_in_several_traces(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trace(
        Path("u.safetensors"),
        {0: 1, 2: 1000, 4: 6},
        domains=["", *(f"[d{n}]" for n in range(9))],
        metadata={"model_fingerprint": "0123456789abcdef" * 4},
        without=["weights"],
    )
    shown = told(capsys, "info t.safetensors u.safetensors")
    for text in (
        "24 (12 prefill, 12 decode)",
        "6 (3 even, 3 odd)",
        "4 to 4, median 4",
        "3: code 12, law 8, art 4",
        "a [lab]",
        "weights, token ids",
        "1 to 1,000, median 6",
        "3 (3 even, 0 odd)",
        "3: [d1] 1,000, [d3] 6, (unnamed) 1",
        "3: 1-2, 5",
        " 0123456789abcdef ",
        "kB)",
    ):
        assert text in shown


def test_info_lists_the_largest_domains_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = {sequence: sequence + 1 for sequence in range(9)}
    save_trace(Path("many.safetensors"), sequences, domains=[f"d{n}" for n in range(9)])
    assert "9: d8 9, d7 8, d6 7, d5 6, d4 5, d3 4, 3 more" in told(capsys, "info many.safetensors")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("merge t.safetensors -o m", "merge got 1 trace, expected two or more"),
        ("merge t.safetensors other.safetensors -o m", "num_experts is 9, but 8 in t.safetensors"),
        ("merge t.safetensors text -o m", "text: not a safetensors file"),
        ("split t.safetensors --by domain --parts 0.5,0.5 -o p", "add --by sequence"),
        ("split t.safetensors --by sequence --parts half -o p", "--parts half: expected shares"),
        ("split t.safetensors --by sequence --parts 0.5,0.1 -o p", "parts 0.5,0.1 add up to 0.6"),
        ("split t.safetensors --by sequence --parts 0.99,0.01 -o p", "part 2 of 2 would hold none of the 6"),
        ("split other.safetensors --by domain -o p", "other.safetensors: names no domains"),
        ("split t.safetensors --by phase -o text", "text: is a file; name a folder"),
        ("split t.safetensors --by phase -o missing/p", "missing does not exist or cannot be written"),
        ("sample t.safetensors --tokens 25 -o s", "t.safetensors: has 24 tokens, 25 are wanted"),
        ("sample t.safetensors --sequences 0 -o s", "has 6 sequences, 0 are wanted"),
        ("sample t.safetensors --per-domain 2 -o s", "has 1 sequences of domain 'art', 2 are wanted"),
        ("sample other.safetensors --per-domain 1 -o s", "other.safetensors: names no domains"),
        ("sample t.safetensors --sequences 1 --single-tokens -o s", "add --tokens N"),
        ("sample t.safetensors --sequences 1 --seed -1 -o s", "seed is -1"),
        ("sample t.safetensors --sequences 1 -o t.safetensors", "is named twice, and would be overwritten"),
        ("sample t.safetensors --sequences 1 -o missing/s", "the folder missing does not exist"),
        ("sample t.safetensors --sequences 1 -o s x=1", "sample takes no settings, but got x=1"),
    ],
)
def test_bad_input_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    save_trace(Path("other.safetensors"), {0: 1}, num_experts=9)
    Path("text").write_text("no trace at all")
    before = Path("t.safetensors").read_bytes()
    assert message in refused(capsys, command)
    assert sorted(path.name for path in folder.iterdir()) == ["other.safetensors", "t.safetensors", "text"]
    assert Path("t.safetensors").read_bytes() == before


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    shape=st.sampled_from([(1, 1), (2, 1), (4, 4), (5, 2)]),
    one_expert=st.booleans(),
    named=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_degenerate_traces_can_be_looked_at(
    lengths: list[int], gaps: list[int], shape: tuple[int, int], one_expert: bool, named: bool
) -> None:
    """One token, one layer, one expert of all used, dense layers between MoE layers: info and stats tell about each."""
    num_experts, top_k = shape
    changed: dict[str, Any] = {}
    if one_expert:
        changed["experts"] = np.tile(np.arange(top_k, dtype=np.uint8), (sum(lengths), len(gaps), 1))
    with tempfile.TemporaryDirectory() as name:
        path = save_trace(
            Path(name) / "t.safetensors",
            dict(enumerate(lengths)),
            num_experts=num_experts,
            top_k=top_k,
            layer_ids=np.cumsum(gaps).tolist(),
            domains=[f"d{n}" for n in range(len(lengths))] if named else None,
            **changed,
        )
        assert main(["info", str(path)]) == 0
        assert main(["stats", str(path)]) == 0


@pytest.mark.parametrize("verb", ["info", "stats", "split --by sequence -o p", "sample --tokens 1 -o s"])
def test_traces_without_content_or_sense_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    nan = np.full((4, 3, 2), np.nan, np.float16)
    save_trace(Path("nan"), {0: 4}, weights=nan)
    save_trace(
        Path("none"),
        {0: 1},
        experts=np.zeros((0, 3, 2), np.uint8),
        weights=np.zeros((0, 3, 2), np.float16),
        sequence=np.zeros(0, np.int32),
        position=np.zeros(0, np.int32),
        decode=np.zeros(0, np.uint8),
        token_ids=np.zeros(0, np.int32),
    )
    name, *flags = verb.split()
    assert "nan: weights [nan, nan] in layer 1 at token 0, expected finite" in refused(
        capsys, " ".join([name, "nan", *flags])
    )
    assert "none: experts has shape [0, 3, 2], expected [tokens >= 1" in refused(
        capsys, " ".join([name, "none", *flags])
    )
    assert sorted(path.name for path in folder.iterdir()) == ["nan", "none", "t.safetensors"]


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("merge", "split", "sample"):
        with pytest.raises(SystemExit) as caught:
            main([verb, "--help"])
        assert caught.value.code == 0
        assert f"example:\n  python -m profiler {verb} " in capsys.readouterr().out
