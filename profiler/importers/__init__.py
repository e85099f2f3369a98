"""Recordings of serving engines, as routes or counts by MoE layer and logical expert; one module per engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from profiler.importers import exflow, sglang, trtllm, vllm
from profiler.importers.recording import ModelFacts, RecordedCounts, RecordedRoutes, Remarks

__all__ = ["IMPORTERS", "ModelFacts", "RecordedCounts", "RecordedRoutes", "Remarks"]

Importer = Callable[[Sequence[Path], ModelFacts, Remarks], RecordedRoutes | RecordedCounts]

#: What reads an engine's files, by the name that the command line gives it. Raises RecordingError on bad input.
IMPORTERS: dict[str, Importer] = {
    "sglang": sglang.read,
    "vllm": vllm.read,
    "trtllm": trtllm.read,
    "exflow": exflow.read,
}
