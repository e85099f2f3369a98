"""Writes a routing trace sequence by sequence; nothing but the sequence at hand is held in memory.

The tensors of a safetensors file stand one after the other, and their lengths are known only at the end. So every
tensor first grows in a file of its own, in a temporary folder beside the output; ``close`` joins them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from profiler.errors import TraceError
from profiler.trace_header import (
    FORMAT_VERSION,
    TRACE_FORMAT,
    encode_header,
    output_errors,
    require_output,
    tensor_shape,
)

TOOL = "expertplan profiler"


class TraceWriter:
    """Writes one routing trace; a context manager that leaves nothing behind when an exception leaves it.

    Args:
        path: the output; replaced at once when the writer is closed.
        model: hub id or path of the model.
        num_experts: logical experts per layer (E), at most 65536.
        layer_ids: decoder layers that are MoE layers, rising (L of them).
        top_k: experts per token and layer (K).
        weights: whether every sequence comes with router weights.
        token_ids: whether every sequence comes with token ids.
        gate_ahead: whether every sequence comes with the experts chosen one layer early.
        model_fingerprint: of the model's configuration.
        expert_bytes: bytes of one routed expert's weights in one layer.
        source: where the routes come from, for people to read.

    Raises:
        TraceError: the output cannot be written, or the shape of the model makes no sense.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str,
        num_experts: int,
        layer_ids: Sequence[int],
        top_k: int,
        weights: bool,
        token_ids: bool,
        gate_ahead: bool = False,
        model_fingerprint: str | None = None,
        expert_bytes: int | None = None,
        source: str | None = None,
    ) -> None:
        self.path = Path(path)
        require_output(self.path)
        if not 1 <= top_k <= num_experts <= 65536 or not layer_ids:
            raise TraceError(
                f"{self.path}: {len(layer_ids)} MoE layers, top_k {top_k} of {num_experts} experts cannot be recorded, "
                "expected at least one layer and 1 <= top_k <= experts <= 65536"
            )
        self._shape = (len(layer_ids), top_k)
        self._num_experts = num_experts
        optional = {"model_fingerprint": model_fingerprint, "expert_bytes": expert_bytes, "source": source}
        self._metadata = {
            "format": TRACE_FORMAT,
            "version": FORMAT_VERSION,
            "model": model,
            "num_experts": str(num_experts),
            "layer_ids": json.dumps(list(layer_ids)),
            "tool": TOOL,
        } | {name: str(value) for name, value in optional.items() if value is not None}
        columns = {"sequence": "<i4", "position": "<i4", "token_ids": "<i4", "weights": "<f2"}
        experts_dtype = "u1" if num_experts <= 256 else "<u2"
        columns |= {"experts": experts_dtype, "gate_ahead": experts_dtype, "decode": "u1"}
        optional_columns = {"weights": weights, "token_ids": token_ids, "gate_ahead": gate_ahead}
        left_out = {name for name, wanted in optional_columns.items() if not wanted}
        # In the order of falling item size every tensor of the file is aligned.
        ordered = sorted(columns.items(), key=lambda column: -np.dtype(column[1]).itemsize)
        self._dtypes: dict[str, np.dtype[Any]] = {n: np.dtype(dtype) for n, dtype in ordered if n not in left_out}
        self._domains: list[str | None] = []
        self._num_tokens = 0
        with output_errors(self.path):
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".parts", dir=self.path.parent))
        self._parts: dict[str, IO[bytes]] = {name: (self._folder / name).open("w+b") for name in self._dtypes}

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._num_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences written so far, which is also the next sequence's id."""
        return len(self._domains)

    def add_sequence(
        self,
        experts: np.ndarray,
        *,
        decode: np.ndarray,
        position: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        token_ids: np.ndarray | None = None,
        gate_ahead: np.ndarray | None = None,
        domain: str | None = None,
    ) -> int:
        """Append the tokens of the next sequence to the disk.

        Args:
            experts: ids ``[T, L, K]``, any integer dtype, sorted by falling weight.
            decode: bool or integer ``[T]``, 1 where the token was fed in a decode step.
            position: integer ``[T]``, rising; by default 0 to T - 1.
            weights: float ``[T, L, K]``, given exactly if the writer was made with ``weights=True``.
            token_ids: integer ``[T]``, given exactly if the writer was made with ``token_ids=True``.
            gate_ahead: ids ``[T, L - 1, K]`` like ``experts``, given exactly if the writer was made with
                ``gate_ahead=True``.
            domain: the prompt's domain.

        Returns:
            The sequence's id.

        Raises:
            TraceError: an array is missing, not wanted, of the wrong shape, or an id is out of range.
        """
        num_tokens = len(experts)
        sequence_id = self.num_sequences
        given: dict[str, np.ndarray | None] = {
            "experts": experts,
            "weights": weights,
            "sequence": np.full(num_tokens, sequence_id),
            "position": np.arange(num_tokens) if position is None else position,
            "decode": decode,
            "token_ids": token_ids,
            "gate_ahead": gate_ahead,
        }
        columns = {name: array for name, array in given.items() if array is not None}
        self._check(columns, num_tokens)
        with output_errors(self.path):
            for name, array in columns.items():
                self._parts[name].write(np.ascontiguousarray(array, self._dtypes[name]).data)
        self._domains.append(domain)
        self._num_tokens += num_tokens
        return sequence_id

    def _check(self, columns: dict[str, np.ndarray], num_tokens: int) -> None:
        if columns.keys() != self._dtypes.keys():
            expected = ", ".join(sorted(self._dtypes))
            raise TraceError(
                f"{self.path}: sequence {self.num_sequences} comes with {', '.join(sorted(columns))}, not {expected}"
            )
        for name, array in columns.items():
            shape = tensor_shape(name, num_tokens, *self._shape)
            if array.shape != shape:
                raise TraceError(
                    f"{self.path}: {name} of sequence {self.num_sequences} is {array.shape}, expected {shape}"
                )
        for name in columns.keys() & {"experts", "gate_ahead"}:
            ids = columns[name]
            if ids.size and not 0 <= ids.min() <= ids.max() < self._num_experts:
                where = "expert ids" if name == "experts" else "expert ids of gate_ahead"
                raise TraceError(
                    f"{self.path}: {where} {ids.min()} to {ids.max()} in sequence {self.num_sequences}, "
                    f"expected 0 to {self._num_experts - 1}"
                )

    def close(self) -> None:
        """Join the tensors to one file and put it in place of the output, in one step.

        Raises:
            TraceError: no token was written.
        """
        if not self._parts:
            return
        try:
            if not self._num_tokens:
                raise TraceError(f"{self.path}: not written, because no token was recorded; give it prompts")
            self._assemble()
        finally:
            self.discard()

    def _assemble(self) -> None:
        if any(domain is not None for domain in self._domains):
            self._metadata["domains"] = json.dumps([domain or "" for domain in self._domains])
        tensors = [
            (name, dtype, tensor_shape(name, self._num_tokens, *self._shape)) for name, dtype in self._dtypes.items()
        ]
        joined = self._folder / "trace"
        with output_errors(self.path):
            with joined.open("wb") as output:
                output.write(encode_header(tensors, self._metadata))
                for name in self._dtypes:
                    self._parts[name].seek(0)
                    shutil.copyfileobj(self._parts[name], output, 1 << 20)
                    self._parts[name].close()
                    (self._folder / name).unlink()
            os.replace(joined, self.path)

    def discard(self) -> None:
        """Remove the temporary files; what was written since the writer was made is lost unless it was closed."""
        for part in self._parts.values():
            with suppress(OSError):  # closing flushes, which fails again where writing failed
                part.close()
        self._parts = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
