"""Whatever stands in a trace or in counts, the verbs give right figures or refuse it in one line."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiler.__main__ import main
from profiler.routing_counts import RoutingCounts
from profiler.statistics import UNNAMED_DOMAIN, collect_by_domain
from profiler.trace_format import RoutingTrace
from tests.support.trace_files import save_trace

BATCH_SIZES = [2**n for n in range(11)]
SHAPES = st.sampled_from([(1, 1), (2, 1), (4, 4), (9, 3), (300, 2)])  # experts, top-k


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A new one for every example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """Exit code, output, and lines of errors of a command."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    out.seek(0)
    return code, out.read(), err.getvalue().strip().splitlines()


def refusal(*arguments: str | Path) -> str:
    """The one line with which a command ends."""
    code, _, lines = run(*arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def distinct_experts(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return np.argsort(scores, axis=-1)[..., :top_k].astype(np.uint8 if num_experts <= 256 else np.uint16)


def information(first_TK: np.ndarray, second_TK: np.ndarray, num_experts: int) -> float:
    """Mutual information over all pairs of choices, from the definition."""
    pairs = np.zeros((num_experts, num_experts))
    for first_T in first_TK.T:
        for second_T in second_TK.T:
            np.add.at(pairs, (first_T, second_T), 1 / first_TK[:, :1].size / first_TK.shape[1] / second_TK.shape[1])
    seen = pairs > 0
    independent = np.outer(pairs.sum(axis=1), pairs.sum(axis=0))
    return float((pairs[seen] * np.log2(pairs[seen] / independent[seen])).sum())


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    shape=SHAPES,
    first_id=st.integers(0, 1),
    step=st.sampled_from([1, 2, 1000]),
    one_expert=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_figures_of_degenerate_traces_follow_their_definitions(
    lengths: list[int],
    gaps: list[int],
    shape: tuple[int, int],
    first_id: int,
    step: int,
    one_expert: bool,
    seed: int,
) -> None:
    """One layer, dense layers between, one token, odd sequences alone, K = E, E = 1, one expert used, 16-bit ids."""
    (num_experts, top_k), num_tokens = shape, sum(lengths)
    experts_TLK = distinct_experts(num_tokens, len(gaps), num_experts, top_k, seed)
    if one_expert:
        experts_TLK[:] = experts_TLK[:1]
    with working_folder() as folder:
        trace = save_trace(
            folder / "t.safetensors",
            dict(zip(range(first_id, first_id + step * len(lengths), step), lengths, strict=True)),
            num_experts=num_experts,
            layer_ids=np.cumsum(gaps).tolist(),
            top_k=top_k,
            experts=experts_TLK,
            decode=np.zeros(num_tokens, np.uint8),
        )
        code, shown, errors = run("stats", trace, "-o", folder / "s.json")
        assert (code, errors) == (0, [])
        figures = json.loads((folder / "s.json").read_text())
    assert "nan" not in shown
    chosen_TLE = (experts_TLK[..., None] == np.arange(num_experts)).any(axis=2)
    popularity_LE, share_LE = chosen_TLE.sum(axis=0), chosen_TLE.mean(axis=0)
    assert figures["popularity"] == popularity_LE.tolist()
    differences_L = np.abs(popularity_LE[:, :, None] - popularity_LE[:, None]).mean(axis=(1, 2))
    expected = {
        "busiest_over_mean": popularity_LE.max(axis=1) / popularity_LE.mean(axis=1),
        "gini": differences_L / 2 / popularity_LE.mean(axis=1),
    }
    for name, values_L in expected.items():
        np.testing.assert_allclose(figures[name]["all"], values_L, atol=1e-6)
    active_BL = [(1 - (1 - share_LE) ** batch).sum(axis=1) for batch in BATCH_SIZES]
    np.testing.assert_allclose(figures["active"]["mixed"], active_BL, atol=1e-5)
    if len(gaps) == 1:
        assert figures["information"] is None
    else:
        bits = [information(experts_TLK[:, n], experts_TLK[:, n + 1], num_experts) for n in range(len(gaps) - 1)]
        np.testing.assert_allclose(figures["information"]["pairs"], bits, atol=1e-5)


@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.sampled_from([0, 0, 1, 7, 2**40])))
@settings(max_examples=15, deadline=None)
def test_counts_with_layers_that_counted_nothing(counts_LE: np.ndarray) -> None:
    """Rows of zeros, as dense layers leave them: a dash, never a ratio."""
    with working_folder() as folder:
        path, page = folder / "c.safetensors", folder / "r.html"
        RoutingCounts(counts_LE, "m", tuple(range(3, 3 + len(counts_LE)))).save(path)
        code, shown, errors = run("stats", path)
        assert (code, errors) == (0, [])
        rows = re.findall(r"^│ *(\d+) │ *(\S+) │", shown, re.MULTILINE)
        assert [row for row, _ in rows] == [str(3 + layer) for layer in range(len(counts_LE))]
        for counts_E, (_, busiest) in zip(counts_LE, rows, strict=True):
            assert busiest == (f"{counts_E.max() / counts_E.mean():.2f}" if counts_E.any() else "-")
        assert run("info", path)[0] == run("report", path, "-o", page)[0] == 0
    assert "-0.00" not in shown


def test_counts_that_cannot_be_added_up_are_refused(tmp_path: Path) -> None:
    RoutingCounts(np.full((2, 4), 2**62), "m", (0, 1)).save(tmp_path / "c")
    assert "holds 3.69e+19 counts" in refusal("info", tmp_path / "c")


@given(
    layer=st.integers(0, 2),
    choice=st.integers(0, 1),
    token=st.integers(0, 5),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
@settings(max_examples=10, deadline=None)
def test_weights_that_are_no_numbers_are_refused_wherever_they_stand(
    layer: int, choice: int, token: int, value: float
) -> None:
    weights = np.tile(np.array([0.75, 0.25], np.float16), (6, 3, 1))
    weights[token, layer, choice] = value
    with working_folder() as folder:
        trace = save_trace(folder / "t", {0: 3, 1: 3}, weights=weights)
        for arguments in (("info", trace), ("stats", trace), ("report", trace, "-o", folder / "r.html")):
            assert f"in layer {(1, 2, 5)[layer]} at token {token}, expected finite" in refusal(*arguments)
        assert [path.name for path in folder.iterdir()] == ["t"]


@given(place=st.floats(0, 1, exclude_max=True), length=st.integers(0, 12), change=st.binary(max_size=12))
@settings(max_examples=60, deadline=None)
def test_damage_to_a_trace_never_ends_in_a_traceback(place: float, length: int, change: bytes) -> None:
    """A run of bytes is replaced by others; the file is then either sound or refused."""
    with working_folder() as folder:
        trace = save_trace(folder / "t", {0: 3, 1: 3}, domains=["code", "law"])
        content = trace.read_bytes()
        start = int(place * len(content))
        trace.write_bytes(content[:start] + change + content[start + length :])
        for arguments in (("info", trace), ("stats", trace), ("sample", trace, "--tokens", "1", "-o", folder / "s")):
            code, _, errors = run(*arguments)
            assert (code, len(errors)) in ((0, 0), (2, 1)), errors


def save_shape(changes: dict[str, Any], path: Path) -> Path:
    return save_trace(path, {0: 3, 1: 3}, **{"num_experts": 8, "layer_ids": (1, 2, 5), "top_k": 2} | changes)


@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "num_experts": st.integers(2, 20),
            "layer_ids": st.sets(st.integers(0, 9), min_size=1, max_size=4).map(sorted),
            "top_k": st.integers(1, 2),
        },
    )
)
@settings(max_examples=15, deadline=None)
def test_a_recording_of_another_model_is_not_merged(changes: dict[str, Any]) -> None:
    with working_folder() as folder:
        mine, other = save_shape({}, folder / "mine"), save_shape(changes, folder / "other")
        arguments = ("merge", mine, other, "-o", folder / "m")
        usual = {"num_experts": 8, "layer_ids": [1, 2, 5], "top_k": 2}
        if usual | changes == usual:
            assert run(*arguments)[0] == 0
        else:
            assert "merge traces of one model only" in refusal(*arguments)
            assert not (folder / "m").exists()


@given(
    names=st.lists(
        st.sampled_from(["", UNNAMED_DOMAIN, "[/]", "[bold]", "a\nb", "</script>", "law\ud800", "decode", "x" * 300])
        | st.text(max_size=5),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=15, deadline=None)
def test_domains_of_any_name_are_counted_and_shown(names: list[str]) -> None:
    """Markup, halves of characters, line breaks, names of phases, no name and the name that stands for none."""
    with working_folder() as folder:
        trace = save_trace(folder / "t", dict.fromkeys(range(len(names)), 3), domains=names)
        commands: Sequence[Sequence[str | Path]] = (
            ("info", trace),
            ("stats", trace, "-o", folder / "s.json"),
            ("split", trace, "--by", "domain", "-o", folder / "parts"),
        )
        for command in commands:
            code, _, errors = run(*command)
            assert (code, errors) == (0, [])
        with RoutingTrace.open(trace) as opened:
            by_domain = collect_by_domain(opened)
        told = json.loads((folder / "s.json").read_text())["tokens"]
    assert sum(statistics.num_tokens for statistics in by_domain.values()) == 3 * len(names)
    assert sum(tokens for name, tokens in told.items() if name.startswith("domain: ")) == 3 * len(names)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_names_that_the_terminal_cannot_show(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    trace = save_trace(tmp_path / "t", {0: 30, 1: 30}, domains=["law\ud800", "右"])
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["info", str(trace)]) == main(["stats", str(trace)]) == 0
    shown.seek(0)
    assert "law?" in shown.read()
