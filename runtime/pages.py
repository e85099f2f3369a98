"""Pages of the key/value cache: which are free, who holds which, and which prefixes they hold.

Kept by rank 0 alone; plans carry the numbers of pages to the ranks, which know neither prefixes nor what is free. What
a page holds is none of this module's business.

A full page can be named by the tokens of its sequence up to its end, and later sequences that begin with the same
tokens share it. Shared pages are full, so nobody writes into them. A page that nobody holds any more keeps its name
until it is needed for something else; the one whose last use is longest ago goes first, and of one sequence's pages
the last.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Name = bytes  # of the tokens from the start of a sequence to the end of a page

NAME_BYTES = 16


class PagePool:
    """The pages of one cache.

    Args:
        num_pages: of the cache.
        page_size: tokens per page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(reversed(range(num_pages)))
        self._holders = [0] * num_pages
        self._names: dict[int, Name] = {}
        self._named: dict[Name, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # pages with a name and no holder, by last use

    @property
    def num_available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._unheld)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def find(self, names: Sequence[Name]) -> list[int]:
        """Pages with the first of these names, up to the first one that is not there."""
        found = []
        for name in names:
            if name not in self._named:
                break
            found.append(self._named[name])
        return found

    def num_taken(self, shared: Sequence[int], new: int) -> int:
        """By how much `num_available` falls when these pages are shared and so many new ones taken."""
        return new + sum(self._holders[page] == 0 for page in shared)

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages that `find` has found."""
        for page in pages:
            self._holders[page] += 1
            self._unheld.pop(page, None)

    def take(self, count: int) -> list[int]:
        """Hold so many pages with nothing in them; there must be as many available."""
        assert count <= self.num_available, f"{count} pages asked for, {self.num_available} available"
        while len(self._free) < count:
            page, _ = self._unheld.popitem(last=False)
            del self._named[self._names.pop(page)]
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def name(self, page: int, name: Name) -> None:
        """Let later sequences find a full page; where another page has the name already, it keeps it."""
        if page not in self._names and name not in self._named:
            self._names[page], self._named[name] = name, page

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages, given in its order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was let go of more often than held"
            if self._holders[page]:
                continue
            if page in self._names:
                self._unheld[page] = None
            else:
                self._free.append(page)


def page_names(tokens: Sequence[int], page_size: int, before: Sequence[Name] = ()) -> list[Name]:
    """Names of all full pages of a sequence: a chain of hashes, so that a name stands for everything up to its page.

    Args:
        tokens: of the sequence, from its start.
        page_size: tokens per page.
        before: names of its first pages, known already.
    """
    names = list(before)
    for end in range((len(names) + 1) * page_size, len(tokens) + 1, page_size):
        chain = hashlib.blake2b(names[-1] if names else b"", digest_size=NAME_BYTES)
        chain.update(array("q", tokens[end - page_size : end]).tobytes())
        names.append(chain.digest())
    return names
