"""Routing traces (``format=routing-trace``, version 1): which experts every token of every prompt was sent to.

A trace is one safetensors file, T tokens, L MoE layers, K choices per token:

* ``experts`` uint8 or uint16 ``[T, L, K]``: logical expert ids, sorted by falling weight
* ``weights`` float16 ``[T, L, K]`` (optional): the router's weights
* ``sequence`` int32 ``[T]``: which prompt; tokens of one sequence stand together
* ``position`` int32 ``[T]``: place in the sequence, rising
* ``decode`` uint8 ``[T]``: 1 where the token was fed in a decode step, 0 in prefill
* ``token_ids`` int32 ``[T]`` (optional)
* ``gate_ahead`` as ``experts``, ``[T, L - 1, K]`` (optional): at l the experts that MoE layer l + 1 would choose given
  the gate input of layer l, sorted by falling weight

Metadata (strings): ``format``, ``version``, ``model``, ``num_experts``, ``layer_ids`` (JSON list), and optionally
``domains`` (JSON list, one name per sequence id), ``source``, ``tool``, ``model_fingerprint``, ``expert_bytes``.

``TraceWriter`` (profiler/trace_writer.py) and ``RoutingCounts`` (profiler/routing_counts.py) are offered here as well.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from profiler.errors import TraceError
from profiler.routing_counts import RoutingCounts
from profiler.trace_header import (
    TRACE_FORMAT,
    check_format,
    map_tensor,
    metadata_int,
    metadata_list,
    read_header,
    read_layers,
    tensor_shape,
)
from profiler.trace_writer import TraceWriter

__all__ = ["RoutingCounts", "RoutingTrace", "Split", "TraceChunk", "TraceWriter"]

Split = Literal["even", "odd", "all"]
TENSORS = {
    "experts": ("U8", "U16"),
    "weights": ("F16",),
    "sequence": ("I32",),
    "position": ("I32",),
    "decode": ("U8",),
    "token_ids": ("I32",),
    "gate_ahead": ("U8", "U16"),
}
OPTIONAL_TENSORS = ("weights", "token_ids", "gate_ahead")
TOKENS_PER_CHUNK = 65536
TOKENS_BETWEEN_RELEASES = 262144
TOKENS_PER_GATHER = 65536


@dataclass(frozen=True)
class TraceChunk:
    """A run of consecutive tokens of a trace; arrays are read-only views of the file.

    Attributes:
        start: index of the first token in the trace.
        experts: uint8 or uint16 ``[T, L, K]``.
        weights: float16 ``[T, L, K]``, or None.
        sequence: int32 ``[T]``.
        position: int32 ``[T]``.
        decode: uint8 ``[T]``.
        token_ids: int32 ``[T]``, or None.
        gate_ahead: uint8 or uint16 ``[T, L - 1, K]``, or None.
    """

    start: int
    experts: np.ndarray
    weights: np.ndarray | None
    sequence: np.ndarray
    position: np.ndarray
    decode: np.ndarray
    token_ids: np.ndarray | None
    gate_ahead: np.ndarray | None

    @property
    def num_tokens(self) -> int:
        """Tokens in this chunk."""
        return len(self.sequence)


class RoutingTrace:
    """A routing trace on disk, read lazily: arrays are mapped into memory, a page is read when it is touched.

    Attributes:
        path: the file.
        metadata: its metadata strings.
        model: hub id or path of the model that was traced.
        num_experts: logical experts per layer (E).
        layer_ids: which decoder layers are MoE layers (L of them).
        num_layers: L.
        top_k: experts per token and layer (K).
        num_tokens: T.
        domains: one name per sequence id, or None.
        has_weights, has_token_ids, has_gate_ahead: whether the optional tensors are there.
        model_fingerprint: of the model's configuration, or None where the trace does not say.
        expert_bytes: bytes of one routed expert's weights in one layer, as traced, or None.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a trace without reading its tensors; see ``open``."""
        self.path = Path(path)
        self.metadata, entries = read_header(self.path)
        check_format(self.path, self.metadata, TRACE_FORMAT)
        self.num_experts, self.layer_ids = read_layers(self.path, self.metadata)
        self.model = self.metadata.get("model", "")
        if not self.model:
            raise TraceError(f"{self.path}: metadata model is missing; record it again")
        self.model_fingerprint: str | None = self.metadata.get("model_fingerprint")
        optional = self.metadata
        self.expert_bytes = metadata_int(self.path, optional, "expert_bytes") if "expert_bytes" in optional else None
        self.domains: tuple[str, ...] | None = (
            metadata_list(self.path, optional, "domains", str) if "domains" in optional else None
        )
        missing = [name for name in TENSORS if name not in entries and name not in OPTIONAL_TENSORS]
        if missing:
            raise TraceError(f"{self.path}: tensors {', '.join(missing)} are missing; record it again")
        shape = entries["experts"].shape
        if len(shape) != 3 or shape[1] != len(self.layer_ids) or not 1 <= shape[2] <= self.num_experts or shape[0] < 1:
            raise TraceError(
                f"{self.path}: experts has shape {list(shape)}, expected [tokens >= 1, {len(self.layer_ids)} layers, "
                f"1 to {self.num_experts} choices]; record it again"
            )
        self.num_tokens, self.num_layers, self.top_k = shape
        self._arrays: dict[str, np.ndarray] = {}
        for name, names_of_dtypes in TENSORS.items():
            if name not in entries:
                continue
            entry = entries[name]
            expected = tensor_shape(name, *shape)
            if entry.dtype_name not in names_of_dtypes or entry.shape != expected:
                raise TraceError(
                    f"{self.path}: {name} is {entry.dtype_name} {list(entry.shape)}, expected "
                    f"{' or '.join(names_of_dtypes)} {list(expected)}; record it again"
                )
            self._arrays[name] = map_tensor(self.path, entry)
        self.has_weights = "weights" in self._arrays
        self.has_token_ids = "token_ids" in self._arrays
        self.has_gate_ahead = "gate_ahead" in self._arrays

    @classmethod
    def open(cls, path: str | Path, validate: bool = True) -> RoutingTrace:
        """Open a trace; usable as a context manager.

        Args:
            path: the safetensors file.
            validate: also read it through once, in chunks, and check every value (``profiler.trace_validation``);
                False checks format, version, shapes, dtypes and the file's size alone, whatever its length.

        Raises:
            TraceError: the file is missing, malformed, truncated, or holds values out of range or order.
        """
        trace = cls(path)
        if validate:
            from profiler.trace_validation import validate_trace

            validate_trace(trace)
        return trace

    def __enter__(self) -> RoutingTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; arrays handed out before stay valid."""
        self._arrays = {}

    def _slice(self, name: str, start: int, stop: int | None) -> np.ndarray:
        if not self._arrays:
            raise ValueError(f"{self.path}: the trace is closed")
        return np.asarray(self._arrays[name][start:stop])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the tensors that it holds, the optional ones among them."""
        return tuple(self._arrays)

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """One of ``columns`` for tokens start to stop, ``[T, …]``, a read-only view."""
        return self._slice(name, start, stop)

    def experts(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Expert ids of tokens start to stop, uint8 or uint16 ``[T, L, K]``, a read-only view."""
        return self._slice("experts", start, stop)

    def expert_chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """All tokens' expert ids in order: index of the first token, and uint8 or uint16 ``[T, L, K]``."""
        return self.column_chunks("experts")

    def column_chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """One of ``columns`` in order, a run of tokens at a time: index of the first token, and its rows.

        Pages of the file that were read are let go of from time to time, so that a pass over a trace larger than the
        memory stays small.
        """
        for start in range(0, self.num_tokens, TOKENS_PER_CHUNK):
            yield start, self.column(name, start, start + TOKENS_PER_CHUNK)
            self._release_after(start, TOKENS_PER_CHUNK)

    def gather_experts(self, tokens: np.ndarray) -> np.ndarray:
        """Copies of some tokens' expert ids, uint8 or uint16 ``[len(tokens), L, K]``; fastest in rising order."""
        rows_TLK = np.empty((len(tokens), self.num_layers, self.top_k), self.experts(0, 1).dtype)
        for start in range(0, len(tokens), TOKENS_PER_GATHER):
            chunk = slice(start, start + TOKENS_PER_GATHER)
            rows_TLK[chunk] = self.experts()[tokens[chunk]]
            self._release()
        return rows_TLK

    def _release_after(self, start: int, num_tokens: int) -> None:
        if start // TOKENS_BETWEEN_RELEASES != (start + num_tokens) // TOKENS_BETWEEN_RELEASES:
            self._release()

    def _release(self) -> None:
        """Give the system back the memory of pages that were read; views stay valid and read them again."""
        for array in self._arrays.values():
            mapped = getattr(array, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def weights(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Router weights, float16 ``[T, L, K]``; TraceError where the trace has none."""
        if not self.has_weights:
            raise TraceError(f"{self.path}: holds no router weights; record it again with weights=true")
        return self._slice("weights", start, stop)

    def sequence(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Sequence ids, int32 ``[T]``."""
        return self._slice("sequence", start, stop)

    def position(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Places in the sequence, int32 ``[T]``."""
        return self._slice("position", start, stop)

    def decode(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """1 where the token was fed in a decode step, uint8 ``[T]``."""
        return self._slice("decode", start, stop)

    def token_ids(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids, int32 ``[T]``; TraceError where the trace has none."""
        if not self.has_token_ids:
            raise TraceError(f"{self.path}: holds no token ids; record it again with token_ids=true")
        return self._slice("token_ids", start, stop)

    def gate_ahead(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Experts chosen one layer early, uint8 or uint16 ``[T, L - 1, K]``; TraceError where the trace has none."""
        if not self.has_gate_ahead:
            raise TraceError(f"{self.path}: holds no choices one layer early; record it again with gate_ahead=true")
        return self._slice("gate_ahead", start, stop)

    def chunks(self, tokens_per_chunk: int = 65536) -> Iterator[TraceChunk]:
        """All tokens in order, at most ``tokens_per_chunk`` at a time; see ``expert_chunks`` on memory."""
        for start in range(0, self.num_tokens, tokens_per_chunk):
            stop = min(start + tokens_per_chunk, self.num_tokens)
            yield TraceChunk(
                start=start,
                experts=self.experts(start, stop),
                weights=self.weights(start, stop) if self.has_weights else None,
                sequence=self.sequence(start, stop),
                position=self.position(start, stop),
                decode=self.decode(start, stop),
                token_ids=self.token_ids(start, stop) if self.has_token_ids else None,
                gate_ahead=self.gate_ahead(start, stop) if self.has_gate_ahead else None,
            )
            self._release_after(start, tokens_per_chunk)

    @cached_property
    def num_sequences(self) -> int:
        """Distinct sequence ids that have tokens."""
        return len(np.unique(self.sequence()))

    def split_mask(self, split: Split) -> np.ndarray:
        """Tokens of the sequences with an even id, an odd id, or all.

        Returns:
            bool ``[T]``.

        Raises:
            TraceError: the name of the split is unknown, or it holds no token.
        """
        if split not in ("even", "odd", "all"):
            raise TraceError(f"split {split!r} is unknown, expected even, odd or all")
        if split == "all":
            return np.ones(self.num_tokens, bool)
        mask = self.sequence() % 2 == (split == "odd")
        if not mask.any():
            raise TraceError(
                f"{self.path}: has no tokens in {split} sequences; record two or more prompts: plans are solved on "
                "even sequences and judged on odd ones"
            )
        return mask

    @cached_property
    def _sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the whole file."""
        return self._sha256
