"""Files of prompts: what is read, and how each error is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiler.prompts import PromptError, read_prompts, tokenize_prompts
from tests.support.tiny_tokenizer import tiny_tokenizer


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one\\ntwo", "domain": "code"}\n\n{"prompt": "été", "other": 1}\n', encoding="utf-8")
    first, second = read_prompts(path)
    assert (first.text, first.domain, first.place) == ("one\ntwo", "code", f"{path}, line 1")
    assert (second.text, second.domain, second.place) == ("été", None, f"{path}, line 3")
    assert read_prompts(path, limit=1) == [first]


def test_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("  one {\n\ntwo\r\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["  one {", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b'{"prompt": "a"}\nhello\n', "line 2: not JSON"),
        (b'{"prompt": ""}\n', 'line 1: has no text under "prompt"'),
        (b'{"text": "a"}\n', 'line 1: has no text under "prompt"'),
        (b'["a"]\n', 'line 1: has no text under "prompt"'),
        (b'{"prompt": 3}\n', 'line 1: has no text under "prompt"'),
        (b'{"prompt": "a", "domain": 3}\n', "line 1: domain is 3, expected a name"),
        (b"\xff\xfe\n", "not UTF-8 text"),
        (b"[" * 100000 + b"\n", "line 1: not JSON"),
        (b'{"prompt": "a \\ud800"}\n', "half of a surrogate pair"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(PromptError, match="cannot be read"):
            read_prompts(path)


def test_prompts_are_checked_against_the_context(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("abc\nabcdefgh\n")
    prompts, tokenizer = read_prompts(path), tiny_tokenizer()
    assert [len(ids) for ids in tokenize_prompts(prompts, tokenizer, 4, 12)] == [3, 8]
    assert [len(ids) for ids in tokenize_prompts(prompts, tokenizer, 4, None)] == [3, 8]
    assert tokenize_prompts(prompts, tokenizer, 4, 8, 4)[1] == [ord(letter) for letter in "abcd"]
    with pytest.raises(PromptError, match=r"line 2: 8 tokens and 4 new ones exceed the context of 11; .*tokens=7"):
        tokenize_prompts(prompts, tokenizer, 4, 11)
