"""Cleaning, cutting and splitting of the corpus on small inputs."""

import json
import lzma
from pathlib import Path

import pytest

from examples.build_corpus import HELDOUT_SHARE, CorpusError, build_domain, parts, select, tidy
from examples.corpus_sources import Domain, Package, html_to_text, roff_to_text


def domain_of(split_by: str = "document", max_bytes: int = 10**6) -> Domain:
    return Domain("sample", "Sample", (Package("apt", "sample", "MIT"),), lambda root: iter(()), split_by, max_bytes)


def test_html_keeps_text_and_block_structure_only() -> None:
    page = (
        "<html><head><title>T</title></head><body><nav>menu</nav><h1>Head&amp;er</h1>"
        "<p>One\n  two<b> three</b></p><script>var x;</script><pre>a\n  b</pre>"
        "<table><tr><td>1</td><td>2</td></tr></table></body></html>"
    )
    assert tidy(html_to_text(page)) == "Head&er\n\nOne two three\n\na\n  b\n\n 1 2"


def test_roff_requests_and_escapes_are_removed() -> None:
    source = "\n".join(
        [
            '.\\" a comment',
            '.TH LS 1 "2023"',
            '.SH "NAME"',
            "ls \\- list \\fIdirectory\\fR contents\\(em\\[lq]all\\[rq]",
            ".B bold text",
            '.BR ls (1), "x y"',
            ".PP",
            "C\\(aqs path: a\\eb",
        ]
    )
    assert tidy(roff_to_text(source)) == (
        "NAME\n\nls - list directory contents—“all”\nbold text\nls(1),x y\n\nC's path: a\\b"
    )


def test_tidy_normalises_blanks_and_control_characters() -> None:
    assert tidy("a \r\n\r\n\r\n\tb\x00\u00a0c  \n") == "a\n\n\tb c"


def test_parts_are_bounded_and_lose_no_words() -> None:
    text = "\n\n".join(f"paragraph {number} " + "word " * 30 for number in range(40)).strip()
    pieces = list(parts(text, 1000))
    assert max(map(len, pieces)) <= 1000
    assert " ".join(" ".join(pieces).split()) == " ".join(text.split())
    assert list(parts("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_select_removes_copies_and_splits_documents_whole() -> None:
    def long_text(number: int) -> str:
        return "\n\n".join(f"line {line} of {number} " + "word " * 100 for line in range(60))

    documents = [(f"doc-{number}", long_text(number)) for number in range(150)]
    copies = [("copy", documents[0][1].upper()), ("short", "too short")]
    split = select(domain_of(max_bytes=10**9), documents + copies)
    sides = {side: {row["id"].split("#")[0] for row in rows} for side, rows in split.items()}
    assert not sides["train"] & sides["heldout"]
    assert sides["train"] | sides["heldout"] == {name for name, _ in documents}
    assert 0 < len(sides["heldout"]) < 3 * HELDOUT_SHARE * 150
    assert split == select(domain_of(max_bytes=10**9), reversed(documents))  # the order of the input does not matter


def test_select_bounds_the_size_of_a_domain() -> None:
    documents = [(f"doc-{number}", f"{number} " + "word " * 200) for number in range(100)]
    split = select(domain_of(max_bytes=20_000), documents)
    assert 15_000 < sum(len(row["text"]) for rows in split.values() for row in rows) <= 20_000


def test_a_domain_without_its_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="domain python has no train text"):
        build_domain("python", tmp_path, tmp_path)


def test_a_domain_is_written_with_its_checksums(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked/python3.11-doc/usr/share/doc/python3.11/html/_sources"
    folder.mkdir(parents=True)
    for number in range(80):
        (folder / f"page{number}.rst.txt").write_text(f"Page {number}\n\n" + "words of the manual " * 20)
    entry = build_domain("python", tmp_path, tmp_path)
    with lzma.open(tmp_path / entry["train"]["file"], "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == entry["train"]["documents"] == 80 - entry["heldout"]["documents"]
    assert sum(len(row["text"].encode()) for row in rows) == entry["train"]["text_bytes"]
    assert not list(tmp_path.glob("*.tmp"))
