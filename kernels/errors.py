"""The error of the operators."""

from __future__ import annotations


class OperatorError(ValueError):
    """Arguments that an operator cannot work on: the message is one line with the value, what fits and the remedy."""
