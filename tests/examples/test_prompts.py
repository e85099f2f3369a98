"""The bundled prompts, and how they are chosen."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples import build_prompts
from examples.build_prompts import MAX_TOKENS, MIN_TOKENS, side_of, squeeze, unseen
from examples.corpus_sources import DOMAINS
from examples.prompt_filters import is_harmless, is_in_language, may_be_shipped

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[dict[str, str]]]:
    return {
        side: [
            json.loads(line)
            for line in (EXAMPLES / "prompts" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for side in ("solve", "judge")
    }


def test_both_sides_cover_every_domain_evenly(prompts: Any) -> None:
    for rows in prompts.values():
        assert all(set(row) == {"prompt", "domain"} for row in rows)
        counts = Counter(row["domain"] for row in rows)
        assert set(counts) == {domain.name for domain in DOMAINS}
        assert min(counts.values()) >= 8
    assert sum(len(rows) for rows in prompts.values()) >= 240


def test_sides_share_no_text(prompts: Any) -> None:
    texts = [squeeze(row["prompt"]) for rows in prompts.values() for row in rows]
    assert len(set(texts)) == len(texts)
    judge = "\n".join(squeeze(row["prompt"]) for row in prompts["judge"])
    assert all(unseen(row["prompt"], judge) for row in prompts["solve"])


def test_prompts_have_the_promised_length_and_language(prompts: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo-moe")
    for row in prompts["solve"] + prompts["judge"]:
        assert MIN_TOKENS <= len(tokenizer(row["prompt"]).input_ids) <= MAX_TOKENS
        assert is_in_language(row["prompt"], row["domain"])
        assert is_harmless(row["prompt"])


def test_page_states_a_licence_for_every_domain() -> None:
    page = (EXAMPLES / "prompts" / "README.md").read_text(encoding="utf-8")
    notices = (EXAMPLES / "prompts" / "licences" / "README.md").read_text(encoding="utf-8")
    for domain in DOMAINS:
        assert f"| {domain.name} | {domain.title} |" in page
        assert domain.name in notices
    assert "manpages-" not in page


@pytest.mark.parametrize(
    ("text", "domain", "expected"),
    [
        ("Wählen Sie die Datei und öffnen Sie das Menü mit der Maus.", "german", True),
        ("Select the file and open the menu with your mouse.", "german", False),
        ("Choisissez le fichier et la page dans le menu des options.", "french", True),
        ("Aby wykonać tę operację, wybierz plik z menu i nie zamykaj okna.", "polish", True),
        ("Table Wizard - Select fields from the sample tables for your own table.", "polish", False),
        ("Выберите файл в меню", "russian", True),
        ("ファイルを選択します", "japanese", True),
        ("选择文件和页面", "japanese", False),
        ("选择文件和页面", "chinese", True),
        ("ファイルを選択します", "chinese", False),
        ("anything at all", "go", True),
    ],
)
def test_untranslated_pages_are_recognised(text: str, domain: str, expected: bool) -> None:
    assert is_in_language(text, domain) is expected


def test_documents_of_unclear_licence_are_left_out() -> None:
    assert may_be_shipped("libreoffice-help-ja/usr/share/a.html#0")
    assert not may_be_shipped("manpages-ja/usr/share/man/ja/man8/sysctl.8.gz#0")
    assert not may_be_shipped("linux-doc-6.1/Documentation/userspace-api/media/v4l/buffer.rst.gz#1")


def test_a_document_with_all_its_parts_falls_to_one_side() -> None:
    names = [f"document-{number}" for number in range(200)]
    sides = Counter(side_of("go", name) for name in names)
    assert set(sides) == {"solve", "judge"}
    assert min(sides.values()) > 60
    assert build_prompts.document_of("a/b.rst#12") == "a/b.rst"


def test_a_passage_half_of_which_was_trained_on_is_refused() -> None:
    training = squeeze("The quick brown fox\njumps over the lazy dog.")
    assert not unseen("the quick brown fox\nhas never stood here", training)
    assert unseen("a sentence that never occurred before at all", training)
