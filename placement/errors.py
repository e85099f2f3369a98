"""Errors of this package that mean bad input."""

from __future__ import annotations

from profiler.errors import InputError


class PlanError(InputError):
    """A placement plan that is missing, malformed, or does not fit what it is used with."""


class ClusterError(InputError):
    """A cluster description that is malformed or too small for what is asked of it."""


class ProblemError(InputError):
    """A placement problem that is malformed or has no solution."""
