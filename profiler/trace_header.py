"""The header of our safetensors files: reading it with every size checked, and laying out a new one.

A safetensors file is an 8-byte little-endian header length, a JSON header (per tensor its dtype, shape and byte
range, plus ``__metadata__``, strings only), and the tensors' bytes. Reading the header and the file's size is enough
to know whether the file is whole, so opening a trace costs the same however large it is.

Source: https://github.com/huggingface/safetensors (format description).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from profiler.errors import TraceError

TRACE_FORMAT = "routing-trace"
COUNTS_FORMAT = "routing-counts"
STATISTICS_FORMAT = "routing-statistics"
FORMAT_VERSION = "1"

MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library sets as well
MOST_DIGITS = 18  # of a number in the metadata: what fits 64 bits
LONGEST_NAME = 200  # of an output, in bytes: file systems allow 255, and temporary names are longer
MOST_EXPERTS = 65536  # what uint16 can tell apart
DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the file.

    Attributes:
        dtype_name: the dtype as safetensors writes it, such as ``U8``.
        shape: sizes of the dimensions.
        offset: first byte, counted from the start of the file.
    """

    dtype_name: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorEntry]]:
    """Read a safetensors header and check it against the file's size; the tensors themselves are not read.

    Args:
        path: the file.

    Returns:
        The metadata, and every tensor's place by name.

    Raises:
        TraceError: the file is missing, unreadable, not safetensors, or shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise TraceError(f"{path}: not a safetensors file, or cut within its header; record or copy it again")
            text = file.read(length)
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); give the path of a trace") from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _parse_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except TraceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise TraceError(f"{path}: its safetensors header is malformed; record or copy it again") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TraceError(f"{path}: its metadata must map names to strings; record it again")
    return metadata, entries


def _parse_entry(path: Path, name: str, entry: Mapping[str, Any], data_start: int, file_size: int) -> TensorEntry:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    dtype_name = str(entry["dtype"])
    dtype = DTYPES.get(dtype_name)  # None: a tensor that our formats don't know, which whoever needs none ignores
    size = end - begin if dtype is None else prod(shape) * dtype.itemsize
    if not 0 <= begin <= end or min(shape, default=0) < 0 or end - begin != size:
        raise TraceError(f"{path}: tensor {name} has a byte range that does not fit its shape {list(shape)}")
    if data_start + end > file_size:
        raise TraceError(
            f"{path}: truncated: tensor {name} ends at byte {data_start + end}, the file at {file_size}; copy it again"
        )
    return TensorEntry(dtype_name, shape, data_start + begin)


def encode_header(tensors: Sequence[tuple[str, np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Lay out tensors one after the other, in the order given, and encode length and header.

    Args:
        tensors: name, dtype and shape of each; in the order of falling item size every tensor is aligned.
        metadata: strings to store beside them.

    Returns:
        The bytes that stand before the first tensor's.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def map_tensor(path: Path, entry: TensorEntry) -> np.ndarray:
    """Map one tensor read-only into memory; its pages are read when they are touched."""
    dtype = DTYPES[entry.dtype_name]
    if prod(entry.shape) == 0:
        return np.empty(entry.shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=entry.offset, shape=entry.shape)


def check_format(path: Path, metadata: Mapping[str, str], expected: str) -> None:
    """Refuse a file of another format or version.

    Raises:
        TraceError: ``format`` is not the expected one, or ``version`` is not 1.
    """
    found = metadata.get("format")
    if found != expected:
        raise TraceError(f"{path}: its format is {found!r}, expected {expected!r}; give a file of that format")
    if metadata.get("version") != FORMAT_VERSION:
        raise TraceError(
            f"{path}: version {metadata.get('version')!r} of {expected} is not supported, expected {FORMAT_VERSION!r}; "
            "use the release that wrote it, or record it again"
        )


def metadata_int(path: Path, metadata: Mapping[str, str], name: str) -> int:
    """A positive whole number from the metadata.

    Raises:
        TraceError: it is missing, or not a positive whole number.
    """
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS) or int(text) == 0:
        raise TraceError(f"{path}: metadata {name} is {metadata.get(name)!r}, expected a positive whole number")
    return int(text)


def metadata_list(path: Path, metadata: Mapping[str, str], name: str, item: type) -> tuple[Any, ...]:
    """A JSON list of one type from the metadata.

    Raises:
        TraceError: it is missing, not JSON, or holds anything else.
    """
    try:
        values = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise TraceError(f"{path}: metadata {name} is missing or not JSON, expected a list; record it again") from error
    if not isinstance(values, list) or not all(type(value) is item for value in values):
        raise TraceError(f"{path}: metadata {name} must be a JSON list of {item.__name__}; record it again")
    return tuple(values)


def read_layers(path: Path, metadata: Mapping[str, str]) -> tuple[int, tuple[int, ...]]:
    """The number of experts and the ids of the MoE layers, checked.

    Raises:
        TraceError: either is missing or malformed, or the layer ids do not rise.
    """
    num_experts = metadata_int(path, metadata, "num_experts")
    if num_experts > MOST_EXPERTS:
        raise TraceError(f"{path}: metadata num_experts is {num_experts}, expected at most {MOST_EXPERTS}")
    layer_ids = metadata_list(path, metadata, "layer_ids", int)
    rising = all(a < b for a, b in itertools.pairwise(layer_ids))
    if not layer_ids or layer_ids[0] < 0 or not rising:
        raise TraceError(f"{path}: layer_ids {list(layer_ids)} must be decoder layers in rising order; record it again")
    return num_experts, layer_ids


def tensor_shape(name: str, num_tokens: int, num_layers: int, top_k: int) -> tuple[int, ...]:
    """The shape of a trace's tensor of that name."""
    if name == "gate_ahead":
        return num_tokens, num_layers - 1, top_k
    return (num_tokens, num_layers, top_k) if name in ("experts", "weights") else (num_tokens,)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a small safetensors file, replacing what stands there in one step.

    Args:
        path: the output.
        tensors: arrays of one of the supported dtypes.
        metadata: strings to store beside them.

    Raises:
        TraceError: the folder does not exist or cannot be written.
    """
    laid_out = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    parts = (np.ascontiguousarray(array).data for array in tensors.values())
    _write_whole(path, itertools.chain([encode_header(laid_out, metadata)], parts))


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing what stands there in one step.

    Raises:
        TraceError: the folder does not exist or cannot be written.
    """
    _write_whole(path, [text.encode()])


def _write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write under a temporary name, then rename."""
    require_output(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    with output_errors(path):
        try:
            with unfinished.open("wb") as file:
                file.writelines(parts)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Tell a failure to write, such as a full disk, in one line that names the output."""
    try:
        yield
    except OSError as error:
        raise TraceError(f"{path}: cannot be written ({error.strerror}); free space, or name another file") from error


def require_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that could not be written, before any work is done for it.

    Args:
        path: the output.
        inputs: files that are read, or other outputs: none of them may be the output.

    Raises:
        TraceError: its folder does not exist or is read-only, or the path is a folder or one of the inputs.
    """
    if any(path.resolve() == other.resolve() for other in inputs):
        raise TraceError(f"{path}: is named twice, and would be overwritten; name another file to write")
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise TraceError(f"{path}: the name is too long; name a file with at most {LONGEST_NAME} bytes")
    if path.is_dir():
        raise TraceError(f"{path}: is a folder; name a file to write")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise TraceError(f"{path}: the folder {path.parent} does not exist or cannot be written; create it first")
