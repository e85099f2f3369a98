"""Pages are held as often as they were taken or shared, found by what they hold, and reused when nobody needs them."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.pages import PagePool, page_names

PAGES, SIZE = 10, 4

# (prompt of which stem, its length): sequences with a common stem begin alike. None lets one go.
OPERATIONS = st.lists(
    st.one_of(st.tuples(st.integers(0, 2), st.integers(1, 20)), st.integers(0, 5)), min_size=1, max_size=40
)


@settings(deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_shared_pages_hold_what_their_sequences_begin_with(operations: list[tuple[int, int] | int]) -> None:
    pool = PagePool(PAGES, SIZE)
    held: list[list[int]] = []
    content: dict[int, tuple[int, ...]] = {}  # the whole sequence up to the page's end
    for operation in operations:
        if isinstance(operation, int):
            if held:
                pool.release(held.pop(operation % len(held)))
        else:
            stem, length = operation
            tokens = [stem] * length
            names = page_names(tokens, SIZE)
            assert len(names) == length // SIZE
            shared = pool.find(names)
            new = pool.pages_for(length) - len(shared)
            taken = pool.num_taken(shared, new)
            if taken > pool.num_available:
                continue
            before = pool.num_available
            pool.share(shared)
            assert [content[page] for page in shared] == [tuple(tokens[: (i + 1) * SIZE]) for i in range(len(shared))]
            pages = [*shared, *pool.take(new)]
            assert pool.num_available == before - taken
            for place, page in enumerate(pages[len(shared) :], len(shared)):
                content[page] = tuple(tokens[: (place + 1) * SIZE])
            for page, name in zip(pages, names, strict=False):
                pool.name(page, name)
            held.append(pages)
        holders = Counter(page for pages in held for page in pages)
        assert pool.num_available == PAGES - len(holders)
        for pages in held:
            exclusive = [page for page in pages if len(content[page]) % SIZE]
            assert all(holders[page] == 1 for page in exclusive), "pages that are not full have one holder"
    for pages in held:
        pool.release(pages)
    assert pool.num_available == PAGES
    assert sorted(pool.take(PAGES)) == list(range(PAGES))


def test_the_page_whose_use_is_longest_ago_is_reused_first_and_of_a_sequence_the_last() -> None:
    pool = PagePool(4, SIZE)
    names = [page_names([stem] * 2 * SIZE, SIZE) for stem in range(2)]
    pages = [pool.take(2) for _ in range(2)]
    for own, own_names in zip(pages, names, strict=True):
        for page, name in zip(own, own_names, strict=True):
            pool.name(page, name)
    pool.release(pages[1])
    pool.release(pages[0])
    assert pool.take(1) == [pages[1][1]]
    assert pool.find(names[1]) == pages[1][:1]
    assert pool.take(2) == [pages[0][1], pages[1][0]]
    assert pool.find(names[1]) == []
    assert pool.find(names[0]) == pages[0][:1]


def test_names_depend_on_all_that_comes_before() -> None:
    first, other = page_names([1] * 8, SIZE), page_names([2] + [1] * 7, SIZE)
    assert len({*first, *other}) == 4
    assert page_names([1] * 8 + [3] * 4, SIZE, first)[:2] == first
    assert page_names([1] * 8 + [3] * 4, SIZE, first) == page_names([1] * 8 + [3] * 4, SIZE)


def test_misuse_is_noticed() -> None:
    pool = PagePool(2, SIZE)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 available"):
        pool.take(3)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(pages)
