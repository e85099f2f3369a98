"""Finds stop strings in a stream of text without letting any part of one through."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Cuts a stream of text before the first stop string that is completed in it.

    One automaton per stop string reads the text character by character, so the result does not depend on how the
    text is split, and the cost is constant per character (amortised). If several stop strings are completed by the
    same character, the cut is before the longest.

    Source: D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6 (1977).
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Prepare for ``stop_strings``, none of them empty."""
        assert all(stop_strings)
        self._stops = tuple(stop_strings)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, bool]:
        """Read more text.

        Args:
            text: what follows.
            may_stop: whether a stop string that is completed in this text counts.

        Returns:
            The text that may go out now, and whether a stop string was found; after that nothing may be pushed.
        """
        if not self._stops:
            return text, False
        buffer = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            completed = self._advance(character)
            if completed and may_stop:
                self._held = ""
                return buffer[: position - completed], True
        keep = len(buffer) - max(self._matched)
        self._held = buffer[keep:]
        return buffer[:keep], False

    def flush(self) -> str:
        """What was held back as a possible beginning of a stop string, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> int:
        """Read one character; the length of the longest stop string that it completes, or 0."""
        completed = 0
        for index, stop in enumerate(self._stops):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = self._borders[index][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                completed = max(completed, matched)
                matched = self._borders[index][-1]  # should this match not count
            self._matched[index] = matched
        return completed


def _borders(pattern: str) -> list[int]:
    """For each prefix of ``pattern`` the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
