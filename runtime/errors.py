"""Errors of the runtime."""

from __future__ import annotations

from profiler.errors import InputError, ModelError

__all__ = ["InputError", "ModelError"]
