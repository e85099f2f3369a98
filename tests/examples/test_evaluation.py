"""The measures of the demo model, and the card that shows them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from examples import demo_moe_card, demo_moe_eval
from examples.demo_moe_data import DemoDataError
from examples.demo_moe_eval import (
    affinity_rows,
    byte_unigram_bits_per_byte,
    mutual_information,
    popularity_rows,
    sample_prompt,
    unigram_bits,
    windows_of,
)

ROOT = Path(__file__).parents[2]


def test_mutual_information_of_known_dependences() -> None:
    left = np.arange(1600).reshape(-1, 1) % 16
    assert mutual_information(left, left, 16) == pytest.approx(4)
    assert mutual_information(left, left // 4, 16) == pytest.approx(2)
    assert mutual_information(left % 4, left // 4, 16) == pytest.approx(0)
    # Two choices a side, of which one pairing in two is determined: all four pairs count alike.
    pairs = np.concatenate([left % 2, 2 + left % 2], axis=1)
    assert mutual_information(pairs, pairs, 16) == pytest.approx(1)


def test_unigram_costs_are_those_of_add_one_frequencies() -> None:
    train, held = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    assert unigram_bits(train, held, 4) == pytest.approx(-np.log2([4 / 8, 2 / 8, 1 / 8]).sum())
    assert byte_unigram_bits_per_byte(b"", b"anything") == pytest.approx(8)
    assert byte_unigram_bits_per_byte(b"a" * 10**6, b"aaaa") < 0.01


def test_windows_are_whole_and_bounded() -> None:
    stream = np.arange(25, dtype=np.uint16)
    assert windows_of(stream, 4, 100).tolist() == [list(range(first, first + 5)) for first in range(0, 25, 5)]
    assert windows_of(stream, 9, 1).tolist() == [list(range(10))]
    assert windows_of(stream, 100, 3).tolist() == [list(range(25))]


def test_popularity_weighs_domains_equally_and_counts_dead_experts() -> None:
    routes = {"large": np.zeros((900, 1, 2), np.uint8), "small": np.ones((10, 1, 2), np.uint8)}
    rows = {row["domain"]: row for row in popularity_rows(routes, 4)}
    assert rows["large"]["busiest_over_mean"] == 4
    assert rows["large"]["dead_experts"] == 3
    assert rows["all"]["busiest_over_mean"] == 2
    assert rows["all"]["dead_experts"] == 2


def test_shuffled_control_loses_the_affinity() -> None:
    first = np.random.default_rng(0).integers(0, 8, (4000, 1, 2)).astype(np.uint8)
    (row,) = affinity_rows({"one": np.concatenate([first, first], axis=1)}, 8, seed=1)
    assert row["top1_bits"] > 2.9
    assert row["all_pairs_bits"] > 0.5
    assert row["top1_shuffled_bits"] < 0.05


def test_sample_prompt_skips_unsuited_documents() -> None:
    class Tokenizer:
        """One token a byte."""

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=list(text.encode()))

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    tokenizer = Tokenizer()
    documents = [
        {"id": "short#0", "text": "too short"},
        {"id": "manpages-de/a#0", "text": "der die das und " * 40},
        {"id": "violent#0", "text": "a murder in the night " * 40},
        {"id": "suited#0", "text": "a peaceful morning in the monthé " * 40},
    ]
    # The 32nd byte is the first of the two of the last character.
    assert bytes(sample_prompt(documents, "drama", tokenizer)).decode() == "a peaceful morning in the month"
    with pytest.raises(DemoDataError, match="no held-out document suited"):
        sample_prompt(documents[:3], "drama", tokenizer)


def test_commit_is_null_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert demo_moe_eval.commit() is None


def test_recorded_figures_name_no_machine_and_the_card_shows_them() -> None:
    figures = json.loads((ROOT / "benchmarks/results/demo_moe.json").read_text(encoding="utf-8"))
    assert figures["command"] == (
        "python -m examples.demo_moe_eval --model examples/demo-moe --corpus .corpus"
        " -o benchmarks/results/demo_moe.json --windows 12"
    )
    assert figures["commit"] is None or len(figures["commit"]) == 40
    training = json.loads((ROOT / "examples/demo-moe/training.json").read_text(encoding="utf-8"))
    assert figures["training"] == training
    page = (ROOT / "examples/demo-moe/README.md").read_text(encoding="utf-8")
    rows = figures["rows"]
    for section in (demo_moe_card.compression, demo_moe_card.popularity, demo_moe_card.affinity, demo_moe_card.samples):
        assert "\n".join(section(rows)).strip() in page


def test_recorded_figures_show_affinity_and_popularity_that_depend_on_the_domain() -> None:
    rows = json.loads((ROOT / "benchmarks/results/demo_moe.json").read_text(encoding="utf-8"))["rows"]
    affinity = [row for row in rows if row["kind"] == "affinity"]
    assert len(affinity) == 7
    assert all(row["all_pairs_bits"] > 0.5 and row["all_pairs_shuffled_bits"] < 0.001 for row in affinity)
    skew = {(row["domain"], row["layer"]): row["busiest_over_mean"] for row in rows if row["kind"] == "popularity"}
    assert all(value > skew["all", layer] for (domain, layer), value in skew.items() if domain != "all")
    assert all(row["dead_experts"] == 0 for row in rows if row["kind"] == "popularity" and row["domain"] == "all")
