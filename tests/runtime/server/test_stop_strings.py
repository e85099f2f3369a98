"""The stop matcher against a search over the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.server.stop_strings import StopMatcher


def cut_by_search(text: str, stops: list[str], start: int = 0) -> tuple[str, bool]:
    """Cut at the stop string that is completed first after ``start``, the longest of those that end there."""
    for end in range(start + 1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


def run(stops: list[str], pieces: list[str], num_before: int = 0) -> tuple[list[str], bool]:
    """What goes out of every piece; in the first ones nothing stops."""
    matcher = StopMatcher(stops)
    sent = []
    for place, piece in enumerate(pieces):
        out, found = matcher.push(piece, may_stop=place >= num_before)
        sent.append(out)
        if found:
            return sent, True
    return [*sent, matcher.flush()], False


letters = st.sampled_from("ab中😀")


@given(
    stops=st.lists(st.text(letters, min_size=1, max_size=5), max_size=4),
    pieces=st.lists(st.text(letters, max_size=6), max_size=12),
    num_before=st.integers(0, 6),
)
def test_equals_search_over_whole_text(stops: list[str], pieces: list[str], num_before: int) -> None:
    sent, found = run(stops, pieces, num_before)
    start = len("".join(pieces[:num_before]))
    assert ("".join(sent), found) == cut_by_search("".join(pieces), stops, start)


@given(stop=st.text(letters, min_size=2, max_size=5), text=st.text(letters, max_size=20))
def test_holds_back_no_more_than_a_possible_beginning(stop: str, text: str) -> None:
    matcher = StopMatcher([stop])
    read, sent = "", ""
    for character in text:
        out, found = matcher.push(character)
        read, sent = read + character, sent + out
        if found:
            return
        longest = max(length for length in range(len(stop)) if read.endswith(stop[:length]))
        assert sent == read[: len(read) - longest]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["abE", "N", "Dxyz"], (["ab", "", ""], True)),
        (["END"], ["abE", "N", "x"], (["ab", "", "ENx", ""], False)),
        (["aab"], ["aaab"], (["a"], True)),
        (["\n\n"], ["one\n", "two\n", "\nthree"], (["one", "\ntwo", ""], True)),
        (["abcd", "bc"], ["abcd"], (["a"], True)),
        (["c", "abc"], ["xab", "c"], (["x", ""], True)),
        (["END"], ["the EN"], (["the ", "EN"], False)),
        ([], ["any", "thing"], (["any", "thing", ""], False)),
    ],
)
def test_cases(stops: list[str], pieces: list[str], expected: tuple[list[str], bool]) -> None:
    assert run(stops, pieces) == expected
