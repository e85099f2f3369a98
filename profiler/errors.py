"""Errors that mean bad input, shared by every package that reads what this one writes."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: the message is one line that names the value, what was expected and the remedy."""


class TraceError(InputError):
    """A routing trace that is missing, malformed, or does not fit what it is used with."""


class ModelError(InputError):
    """A model that is missing, unreadable, or has no experts that could be recorded."""
