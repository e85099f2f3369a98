"""Copies tokens of traces into new ones, a run of tokens at a time: what merge, split and sample have in common.

Every tensor that a trace holds is copied the same way, so that optional ones are carried along. How many tokens an
output gets is known before the first is copied, so each tensor is written straight to its place in the file.

Shape suffixes: T tokens of a trace, S its sequences.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from profiler.errors import TraceError
from profiler.trace_format import RoutingTrace
from profiler.trace_header import MAX_HEADER_BYTES, encode_header, output_errors

# Per tensor its dtype, and its shape without the dimension of tokens.
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]


@dataclass(frozen=True)
class Piece:
    """Tokens of one trace that go into another, in their order.

    Attributes:
        path: the trace; opened when its turn comes, since a process may not hold many files open.
        num_tokens: tokens that are taken.
        keep_T: bool ``[T]``, which they are; None for all.
        sequence_T: int32 ``[T]``, the new sequence ids; None for those of the trace.
    """

    path: Path
    num_tokens: int
    keep_T: np.ndarray | None = None
    sequence_T: np.ndarray | None = None


@dataclass(frozen=True)
class NewTrace:
    """A trace to write.

    Attributes:
        path: the output.
        pieces: where its tokens come from, one after the other.
        layout: its tensors, which every piece's trace holds.
        metadata: its metadata strings.
    """

    path: Path
    pieces: Sequence[Piece]
    layout: Layout
    metadata: Mapping[str, str]


def read_layout(trace: RoutingTrace) -> Layout:
    """The tensors of an open trace."""
    columns = {name: trace.column(name) for name in trace.columns}
    return {name: (column.dtype, column.shape[1:]) for name, column in columns.items()}


def write_traces(folder: Path, outputs: Iterable[NewTrace]) -> None:
    """Write all outputs or none; they take their places together, once the last is complete.

    Args:
        folder: where all of them lie.
        outputs: asked for one after the other. Where there are several, none stands there yet.

    Raises:
        TraceError: an output cannot be written, or a trace that is copied can no longer be read.
    """
    with output_errors(folder):
        unfinished = Path(tempfile.mkdtemp(prefix=".traces.", suffix=".parts", dir=folder))
    try:
        written: list[Path] = []
        for output in outputs:
            with output_errors(output.path):
                _write_trace(unfinished / str(len(written)), output)
            written.append(output.path)
        _put_in_place(unfinished, written)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_in_place(unfinished: Path, paths: Sequence[Path]) -> None:
    done: list[Path] = []
    try:
        for number, path in enumerate(paths):
            with output_errors(path):
                os.replace(unfinished / str(number), path)
            done.append(path)
    except BaseException:
        for path in done:
            path.unlink(missing_ok=True)
        raise


def _write_trace(path: Path, output: NewTrace) -> None:
    num_tokens = sum(piece.num_tokens for piece in output.pieces)
    # In the order of falling item size every tensor of the file is aligned.
    names = sorted(output.layout, key=lambda name: -output.layout[name][0].itemsize)
    tensors = [(name, output.layout[name][0], (num_tokens, *output.layout[name][1])) for name in names]
    header = encode_header(tensors, output.metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise TraceError(
            f"{output.path}: its metadata takes {len(header):,} bytes, expected at most {MAX_HEADER_BYTES:,}; write "
            "fewer sequences with domains into one file"
        )
    place, end = {}, len(header)
    for name, dtype, shape in tensors:
        place[name] = end
        end += prod(shape) * dtype.itemsize
    with path.open("wb") as file:
        file.write(header)
        for piece in output.pieces:
            with RoutingTrace.open(piece.path, validate=False) as trace:
                for name, dtype, _ in tensors:
                    file.seek(place[name])
                    for rows in _rows(trace, name, piece):
                        file.write(np.ascontiguousarray(rows, dtype).data)
                    place[name] = file.tell()


def _rows(trace: RoutingTrace, name: str, piece: Piece) -> Iterator[np.ndarray]:
    """The rows of one tensor that a piece takes, a run of tokens at a time."""
    for start, rows in trace.column_chunks(name):
        chunk = slice(start, start + len(rows))
        if name == "sequence" and piece.sequence_T is not None:
            rows = piece.sequence_T[chunk]
        yield rows if piece.keep_T is None else rows[piece.keep_T[chunk]]
