"""Opens whatever holds routing: a trace, or counts."""

from __future__ import annotations

from pathlib import Path

from profiler.routing_counts import RoutingCounts
from profiler.trace_format import RoutingTrace
from profiler.trace_header import COUNTS_FORMAT, read_header


def open_routing(path: Path) -> RoutingTrace | RoutingCounts:
    """Open a file by the format that its header names.

    Raises:
        TraceError: it is neither a routing trace nor routing counts, or malformed.
    """
    metadata, _ = read_header(path)
    return RoutingCounts.open(path) if metadata.get("format") == COUNTS_FORMAT else RoutingTrace.open(path)
