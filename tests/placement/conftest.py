"""Traces for the tests of placement."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from profiler.trace_format import RoutingTrace
from tests.support.routes import make_routes, write_routes


@pytest.fixture(scope="session")
def small_trace(tmp_path_factory) -> Path:
    """800 tokens, 4 layers, 8 experts, top-2."""
    path = tmp_path_factory.mktemp("traces") / "small.safetensors"
    return write_routes(path, make_routes(0, 800, 4, 8, 2), 8, expert_bytes=1000)


@pytest.fixture(scope="session")
def real_trace() -> RoutingTrace:
    """The gpt-oss-20b trace, where the folder of traces has it."""
    path = Path(os.environ.get("EXPERTPLAN_TRACES", "../shared/traces")) / "gpt-oss-20b.safetensors"
    if not path.is_file():
        pytest.skip(f"no trace {path}; name its folder in EXPERTPLAN_TRACES")
    return RoutingTrace.open(path, validate=False)
