"""The report without a browser: what it says, what it escapes, what it leaves out, and how large it is."""

from __future__ import annotations

import base64
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from profiler.__main__ import main
from profiler.report import render_report
from profiler.report.figures import figures_data, plain
from profiler.report.matrices import encode_matrix, next_layer_shares, same_layer_shares
from profiler.report.missing import COUNTS_ALONE, ONE_LAYER
from profiler.report.options import MOST_DOMAINS, popularity_views
from profiler.report.summary import summarize
from profiler.report.tables import predictor_table
from profiler.routing_counts import RoutingCounts
from tests.support.profiles import make_counts_profile, make_profile, make_score
from tests.support.traces import random_sequences, write_trace

HOSTILE = "</script><script>alert(1)</script><b>&amp;\u2028\ud800"


class Outline(HTMLParser):
    """Elements, their ids, every address, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def embedded_data(page: str) -> dict:
    text = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page, re.DOTALL).group(1)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the page")

    return json.loads(text, parse_constant=refuse)


def test_the_page_needs_nothing_else() -> None:
    outline = Outline(render_report(make_profile()))
    assert all(address.startswith(("#", "data:")) for address in outline.addresses)
    assert len(set(outline.ids)) == len(outline.ids)
    assert {"report-data", "summary", "popularity-chart", "predictors-chart"} <= set(outline.ids)
    assert outline.tags.count("h1") == 1


def test_names_from_the_trace_are_text_everywhere() -> None:
    profile = make_profile(domains=(HOSTILE, "law"))
    source = replace(profile.source, model=HOSTILE, source=HOSTILE, path=HOSTILE)
    page = render_report(replace(profile, source=source))
    plain_page = Outline(render_report(make_profile(domains=("code", "law"))))
    outline = Outline(page)
    assert sorted(set(outline.tags)) == sorted(set(plain_page.tags))
    assert outline.tags.count("script") == plain_page.tags.count("script")
    assert page.encode()
    assert embedded_data(page)["domains"]["names"] == [HOSTILE, "law"]


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(0, 1)))
def test_packed_matrices_are_as_precise_as_the_glossary_says(shares: np.ndarray) -> None:
    packed = encode_matrix(shares)
    levels = np.frombuffer(zlib.decompress(base64.b64decode(packed["data"])), np.uint8).reshape(shares.shape)
    np.testing.assert_allclose(packed["scale"] * (levels / 255.0) ** 2, shares, rtol=0, atol=shares.max() / 255 + 1e-15)


def test_shares_are_of_the_tokens_that_chose_the_row() -> None:
    statistics = make_profile(num_layers=3, top_k=2).statistics
    assert statistics is not None
    # Each token that chose an expert chooses two in the next layer, and one more in its own.
    np.testing.assert_allclose(next_layer_shares(statistics, 1).sum(axis=1), 2)
    np.testing.assert_allclose(same_layer_shares(statistics, 1).sum(axis=1), 1)


@settings(max_examples=20, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(0, 3)))
def test_counts_alone_make_a_page_without_nan(counts_LE: np.ndarray) -> None:
    profile = make_counts_profile(counts_LE)
    json.dumps(figures_data(profile), allow_nan=False)
    assert not any("nan" in finding.text for finding in summarize(profile))
    assert len(summarize(profile)) >= 2


def test_what_is_missing_is_said() -> None:
    counts = Outline(render_report(make_counts_profile(np.array([[3, 1, 0], [0, 0, 0]]))))
    assert counts.text.count(COUNTS_ALONE) == 8
    assert "affinity-chart" not in counts.ids
    assert "affinity-pair" not in counts.ids
    one_layer = replace(make_profile(num_layers=1), information=None, convergence=None, potentials=(), predictors=())
    page = Outline(render_report(one_layer))
    assert page.text.count(ONE_LAYER) == 3
    assert "coactivation-chart" in page.ids
    assert "Predictors were not judged" in page.text


def test_the_summary_names_its_numbers() -> None:
    profile = make_profile(num_layers=3, num_experts=8)
    popularity = np.full((3, 8), 10)
    popularity[1] = [0, 10, 10, 10, 10, 10, 10, 100]
    said = [finding.text for finding in summarize(replace(profile, popularity=popularity))]
    assert len(said) == 9
    assert "Layer 3 is the most skewed: expert 7 gets 5.0× its share" in said[0]
    assert "1 of 24 experts were never chosen" in said[1]
    assert "up to 56% of pairs on one of 4 GPUs (contiguous 25%)" in said[2]
    assert "gets 1.90× its share in the worst layer: load must be bounded" in said[2]
    assert "1, 8 and 32 decode tokens" in said[4]
    assert "stable after 2,000 tokens, within the 1,000–3,000 that ExFlow claims" in said[5]
    assert all(re.search(r"\d", finding) for finding in said)


@pytest.mark.parametrize(
    ("stable_at", "words"),
    [
        (500, "fewer than the 1,000"),
        (8000, "still moving at 8,000 tokens"),
        (2000, "within"),
        (1000, "the most that were counted."),
        (1001, "the most that were counted; a longer trace may put it later."),
    ],
)
def test_convergence_is_held_against_the_claim(stable_at: int, words: str) -> None:
    profile = make_profile()
    assert profile.convergence is not None
    profile = replace(profile, convergence=replace(profile.convergence, stable_at=stable_at))
    assert any(words in finding.text for finding in summarize(profile))


def test_no_more_than_chance_is_called_chance() -> None:
    profile = make_profile()
    assert profile.information is not None
    assert profile.domain_drift is not None
    profile = replace(
        profile,
        information=replace(profile.information, pairs=profile.information.pairs_shuffled),
        domain_drift=replace(profile.domain_drift, to_all_control=profile.domain_drift.to_all),
    )
    said = " ".join(finding.text for finding in summarize(profile))
    assert "placement by affinity has nothing to gain" in said
    assert "one plan serves all domains" in said


def test_a_local_folder_is_shown_by_its_name() -> None:
    profile = make_profile()
    page = render_report(replace(profile, source=replace(profile.source, model="/home/someone/models/tiny-moe")))
    assert "<h1>tiny-moe</h1>" in page
    assert "someone" not in page
    assert "<h1>org/model</h1>" in render_report(profile)


def test_many_domains_stay_a_readable_choice() -> None:
    profile = make_profile(domains=tuple(f"d{n}" for n in range(40)))
    views = popularity_views(profile)
    assert [view.label for view in views[:3]] == ["All tokens", "Prefill", "Decode"]
    assert len(views) == 3 + MOST_DOMAINS
    assert len(embedded_data(render_report(profile))["domains"]["names"]) == 40


def test_predictors_without_a_measure_show_a_dash() -> None:
    gate = predictor_table(make_profile()).rows[1]
    assert (gate[0], gate[5:]) == ("gate", ("–", "–", "–"))


def test_predictors_are_compared_on_the_layers_that_all_predict() -> None:
    """The first layer, which few predict, is easy here: it must not make those few look better."""
    profile = make_profile(num_layers=3)
    rng = np.random.default_rng(0)
    easy = replace(make_score("popularity", (1, 3, 5), rng), hit_rate=np.array([1, 0.3, 0.3]))
    path = replace(make_score("path-1", (3, 5), rng), hit_rate=np.array([0.4, 0.5]))
    profile = replace(profile, predictors=(easy, path))
    assert [row[2:4] for row in predictor_table(profile).rows] == [("30.0%", "30%–30%"), ("45.0%", "40%–50%")]
    assert "The best predictor is path-1" in " ".join(finding.text for finding in summarize(profile))


def test_numbers_become_plain() -> None:
    assert plain(np.array([1 / 3, np.nan, np.inf])) == [0.333333, None, None]


@pytest.mark.parametrize(("shape", "most_mb"), [((24, 32, 4), 5.5), ((58, 256, 8), 15)])
def test_size(shape: tuple[int, int, int], most_mb: float) -> None:
    page = render_report(make_profile(*shape, num_tokens=1500, domains=tuple("abcdefgh")))
    assert len(page.encode()) < most_mb * 1e6


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t.safetensors", random_sequences([30] * 8), domains=["code", "law\ud800"] * 4)
    assert main(["report", str(trace), "-o", str(tmp_path / "r.html")]) == 0
    shown = capsys.readouterr().out
    assert "is the most skewed: expert" in shown
    assert "r.html: 4.9 MB, open it in a browser" in " ".join(shown.split())
    assert embedded_data((tmp_path / "r.html").read_text())["experts"] == 8
    RoutingCounts(np.array([[5, 1], [2, 2]]), "m", (0, 1)).save(tmp_path / "c.safetensors")
    assert main(["report", str(tmp_path / "c.safetensors"), "-o", str(tmp_path / "r.html")]) == 0
    assert embedded_data((tmp_path / "r.html").read_text())["popularity"][0]["counts"] == [[5, 1], [2, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "r.html", "t.safetensors"]


@pytest.mark.parametrize("output", ["missing/r.html", "t.safetensors"])
def test_outputs_that_cannot_be(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t.safetensors", random_sequences([9]))
    assert main(["report", str(trace), "-o", str(tmp_path / output)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
