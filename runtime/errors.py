"""Errors of the runtime."""

from __future__ import annotations

from profiler.errors import InputError, ModelError

__all__ = ["InputError", "ModelError", "first_line", "one_line"]


def one_line(error: BaseException) -> str:
    """An error's whole text on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything, or its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
