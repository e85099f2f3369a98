"""Routing counts (``format=routing-counts``, version 1): how many tokens each expert got, and nothing more.

Engines often record no more than this. It is enough for popularity, not for affinity or co-activation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiler.errors import TraceError
from profiler.trace_header import (
    COUNTS_FORMAT,
    FORMAT_VERSION,
    check_format,
    map_tensor,
    read_header,
    read_layers,
    write_tensors,
)

MOST_COUNTED = 2.0**62  # so that sums fit 64 bits


@dataclass(frozen=True)
class RoutingCounts:
    """Token–expert pairs per layer and expert.

    Attributes:
        counts: int64 ``[L, E]``.
        model: hub id or path of the model.
        layer_ids: which decoder layers the rows are, rising.
        source: where the counts come from, for people to read.
    """

    counts: np.ndarray
    model: str
    layer_ids: tuple[int, ...]
    source: str | None = None

    @property
    def num_experts(self) -> int:
        """Logical experts per layer (E)."""
        return int(self.counts.shape[1])

    @classmethod
    def open(cls, path: str | Path) -> RoutingCounts:
        """Read a file of counts.

        Raises:
            TraceError: the file is missing, malformed, of another format or version, or holds counts that are
                negative or whose sum is beyond 64 bits.
        """
        path = Path(path)
        metadata, entries = read_header(path)
        check_format(path, metadata, COUNTS_FORMAT)
        num_experts, layer_ids = read_layers(path, metadata)
        entry, shape = entries.get("counts"), (len(layer_ids), num_experts)
        if entry is None or entry.dtype_name != "I64" or entry.shape != shape:
            found = "missing" if entry is None else f"{entry.dtype_name} {list(entry.shape)}"
            raise TraceError(f"{path}: counts is {found}, expected I64 {list(shape)}; export it again")
        counts = np.array(map_tensor(path, entry))
        if counts.min() < 0:
            raise TraceError(f"{path}: holds the count {counts.min()}, expected >= 0; export it again")
        if counts.sum(dtype=np.float64) > MOST_COUNTED:
            raise TraceError(
                f"{path}: holds {counts.sum(dtype=np.float64):.3g} counts, which no engine counted; export it again"
            )
        if not metadata.get("model"):
            raise TraceError(f"{path}: metadata model is missing; export it again")
        return cls(counts, metadata["model"], layer_ids, metadata.get("source"))

    def save(self, path: str | Path) -> None:
        """Write the counts, replacing the file in one step.

        Raises:
            TraceError: the folder does not exist or cannot be written.
        """
        metadata = {
            "format": COUNTS_FORMAT,
            "version": FORMAT_VERSION,
            "model": self.model,
            "num_experts": str(self.num_experts),
            "layer_ids": json.dumps(list(self.layer_ids)),
        } | ({"source": self.source} if self.source is not None else {})
        write_tensors(Path(path), {"counts": self.counts.astype("<i8")}, metadata)
