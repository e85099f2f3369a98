"""Take the example prompts from the corpus' held-out documents: one file to solve on, one to judge on.

    python -m examples.build_prompts --model examples/demo-moe --corpus .corpus -o examples/prompts

A prompt is a passage of one held-out document of which neither half occurs in the training text. A document falls to
one side by the hash of its name, so no document has prompts on both sides.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from examples.build_corpus import unit_interval, write_atomically
from examples.demo_moe_data import DemoDataError, read_documents, read_manifest
from examples.prompt_filters import is_harmless, is_in_language, may_be_shipped

SIDES = ("solve", "judge")
MIN_TOKENS, MAX_TOKENS = 40, 150
README = """# Example prompts

Prompts for the demo model, one JSON object `{{"prompt", "domain"}}` a line, {minimum} to {maximum} of its tokens each.

**Solve on `solve.jsonl`, judge on `judge.jsonl`:** record a trace of the first and solve a plan on it, then evaluate
the plan on a trace of the second. The two files share no document: a document, with all its passages, falls to one side
by the SHA-256 hash of its name.

Every prompt is a passage of text that was held out of the demo model's training: neither of its halves occurs in the
training text of its domain (white space and case aside). Left out are passages in another language than their domain's,
and passages with words of sex, of violence or of groups that old texts speak ill of. `python -m examples.build_prompts`
writes the two files and this page.

The passages are not under the project's licence. They are short excerpts that keep the licences of their sources, all
of which allow redistribution; [licences](licences) holds the notices and the full texts. No text is taken from
translated manual pages, whose licences differ from page to page.

| domain | text | package | licence | solve | judge |
|---|---|---|---|---|---|
{rows}
| all | | | | {solve} | {judge} |
"""


def document_of(identity: str) -> str:
    """Name of the document that the part called ``identity`` (``name#number``) belongs to."""
    return identity.rpartition("#")[0]


def side_of(domain: str, document: str) -> str:
    """``solve`` or ``judge``, by the hash of the document's name."""
    return SIDES[unit_interval(f"prompts/{domain}/{document}") < 0.5]


def passages(text: str, tokenizer: Any) -> Iterator[str]:
    """Runs of whole lines of ``text`` that have between MIN_TOKENS and MAX_TOKENS tokens, in order, not overlapping."""
    passage: list[str] = []
    target = 60 + int(60 * unit_interval(text))  # lengths differ from document to document, not within one
    for line in text.split("\n"):
        passage.append(line)
        joined = "\n".join(passage).strip()
        tokens = len(tokenizer(joined).input_ids)
        if tokens >= target:
            if tokens > MAX_TOKENS:
                joined = cut_at_word(joined, tokens)
            if len(set(joined)) > 15 and MIN_TOKENS <= len(tokenizer(joined).input_ids) <= MAX_TOKENS:
                yield joined
            passage = []


def cut_at_word(text: str, tokens: int) -> str:
    """The beginning of ``text`` that has about 100 of its ``tokens``, to the end of a word where it has blanks."""
    end = len(text) * 100 // tokens
    return re.sub(r"\s+\S*$", "", text[:end]) or text[:end]


def squeeze(text: str) -> str:
    """Lower case without white space, so that line breaks do not hide a repetition."""
    return re.sub(r"\s+", "", text).lower()


def unseen(passage: str, training: str) -> bool:
    """Whether neither half of ``passage`` occurs in the squeezed training text."""
    flat = squeeze(passage)
    middle = len(flat) // 2
    return flat[:middle] not in training and flat[middle:] not in training


def candidates_of(rows: list[dict[str, str]], domain: str, tokenizer: Any) -> dict[str, Iterator[str]]:
    """Passages that may serve as prompts, by document, the documents in an order fixed by hashes."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        if may_be_shipped(row["id"]):
            parts.setdefault(document_of(row["id"]), []).append(row["text"])

    def usable(texts: list[str]) -> Iterator[str]:
        for text in texts:
            for passage in passages(text, tokenizer):
                if is_in_language(passage, domain) and is_harmless(passage):
                    yield passage

    order = sorted(parts, key=lambda document: unit_interval(f"order/{domain}/{document}"))
    return {document: usable(parts[document]) for document in order}


def select_prompts(corpus: Path, domain: str, tokenizer: Any, count: int) -> dict[str, list[dict[str, str]]]:
    """Up to ``count`` prompts a side, at most one a document while documents last."""
    training = squeeze("\n".join(row["text"] for row in read_documents(corpus, domain, "train")))
    candidates = candidates_of(read_documents(corpus, domain, "heldout"), domain, tokenizer)
    chosen: dict[str, list[str]] = {side: [] for side in SIDES}
    taken: set[str] = set()
    while candidates and any(len(texts) < count for texts in chosen.values()):
        for document in list(candidates):
            side = chosen[side_of(domain, document)]
            passage = next(candidates[document], None)
            if passage is None or len(side) == count:
                del candidates[document]
            elif passage not in taken and unseen(passage, training):
                taken.add(passage)
                side.append(passage)
    return {side: [{"prompt": text, "domain": domain} for text in texts] for side, texts in chosen.items()}


def shipped_sources(entry: dict[str, Any]) -> list[dict[str, str]]:
    """The packages of a domain in the manifest that prompts are taken from."""
    return [source for source in entry["sources"] if may_be_shipped(source["package"])]


def readme(manifest: dict[str, Any], counts: dict[str, dict[str, int]]) -> str:
    """Page that says what the prompts are, how they are split, and each domain's source and licence."""
    rows = []
    for entry in manifest["domains"]:
        sources, sides = shipped_sources(entry), counts[entry["name"]]
        packages = " + ".join(f"{source['package']} ({source['manager']})" for source in sources)
        licences = "; ".join(dict.fromkeys(source["licence"] for source in sources))
        rows.append(
            f"| {entry['name']} | {entry['title']} | {packages} | {licences} | {sides['solve']} | {sides['judge']} |"
        )
    total = {side: sum(sides[side] for sides in counts.values()) for side in SIDES}
    return README.format(
        minimum=MIN_TOKENS, maximum=MAX_TOKENS, rows="\n".join(rows), solve=total["solve"], judge=total["judge"]
    )


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description="Take the example prompts from held-out text.")
    parser.add_argument("--model", type=Path, default=Path("examples/demo-moe"), help="folder of the tokenizer")
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("-o", "--output", type=Path, default=Path("examples/prompts"))
    parser.add_argument("--count", type=int, default=12, help="prompts per domain and side")
    arguments = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.model_max_length = 10**9  # passages are cut from documents that are longer than the context
    found: dict[str, list[dict[str, str]]] = {side: [] for side in SIDES}
    counts = {}
    try:
        manifest = read_manifest(arguments.corpus)
        for entry in manifest["domains"]:
            prompts = select_prompts(arguments.corpus, entry["name"], tokenizer, arguments.count)
            counts[entry["name"]] = {side: len(prompts[side]) for side in SIDES}
            print(f"{entry['name']:12s} {counts[entry['name']]}", flush=True)
            for side in SIDES:
                found[side] += prompts[side]
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    for side, rows in found.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(arguments.output / f"{side}.jsonl", lines.encode())
    write_atomically(arguments.output / "README.md", readme(manifest, counts).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
