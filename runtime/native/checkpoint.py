"""Fills the decoder's weights from Hugging Face safetensors, straight from the mapped files, or with random numbers."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from runtime.errors import ModelError, one_line
from runtime.native.staging import Staging
from runtime.native.weights import Part

NUM_THREADS = 8
STANDARD_DEVIATION = 0.02


def fill_from_checkpoint(path: str, parts: Sequence[Part]) -> None:
    """Copy every part out of a model's files; foreign experts are never read.

    Args:
        path: directory with safetensors files, or a hub id.
        parts: from `runtime.native.weights.allocate`.

    Raises:
        ModelError: the model cannot be found or read, or lacks a tensor, or one has another shape.
    """
    from safetensors import SafetensorError

    try:
        files = tensor_files(path)
        by_file: dict[Path, list[Part]] = {}
        for part in parts:
            if part.name not in files:
                raise ModelError(
                    f"model {path}: the checkpoint lacks {part.name}; is the download complete? Other layouts are read "
                    "with path=universal"
                )
            by_file.setdefault(files[part.name], []).append(part)
        shares = [(file, own[start::NUM_THREADS]) for file, own in by_file.items() for start in range(NUM_THREADS)]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(lambda share: _copy_parts(*share), shares))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model {path}: cannot be loaded ({one_line(error)}); copy or download it again") from error


def tensor_files(path: str) -> dict[str, Path]:
    """The safetensors file of every tensor of a model."""
    from safetensors import safe_open

    folder = Path(path)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: no list of tensors ({one_line(error)}); copy or download it again") from error
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _copy_parts(file: Path, parts: Sequence[Part]) -> None:
    from safetensors import safe_open

    if not parts:
        return
    device = parts[0].destination.device
    with safe_open(file, framework="pt") as tensors, _stage(device) as staging:
        for part in parts:
            source = _read(tensors, part)
            if staging is None or (part.arrange is None and source.dtype == part.destination.dtype):
                _place(part, source, staging)
                continue
            uploaded = torch.empty_like(source, device=device)
            staging.copy(source, uploaded)
            _place(part, uploaded, None)


@contextmanager
def _stage(device: torch.device) -> Iterator[Staging | None]:
    """A thread's way to a GPU, on whose stream everything runs until all has arrived; None on a CPU."""
    if device.type != "cuda":
        yield None
        return
    staging = Staging(device)
    with torch.cuda.stream(staging.stream):
        yield staging
    staging.stream.synchronize()


def _place(part: Part, source: torch.Tensor, staging: Staging | None) -> None:
    """Put a tensor of the checkpoint where it belongs."""
    if part.arrange is not None:
        source = part.arrange(source)
    if source.shape != part.destination.shape:
        raise _other_shape(part, list(source.shape), list(part.destination.shape))
    if staging is None:
        part.destination.copy_(source)
    else:
        staging.copy(source, part.destination)


def _read(tensors: Any, part: Part) -> torch.Tensor:
    """What a part takes of an open file, of which nothing else is touched.

    Raises:
        ModelError: the file's tensor has no such row, or another size than the piece is of.
    """
    row, piece = part.row, part.piece
    source: torch.Tensor
    if piece is not None:
        tensor, expected = tensors.get_slice(part.name), list(part.destination.shape)
        size = expected[piece.dimension]
        expected[piece.dimension] = piece.total
        if tensor.get_shape() != expected:  # it may well have the shape of the piece
            raise _other_shape(part, tensor.get_shape(), expected)
        entries = slice(piece.start, piece.start + size)
        source = tensor[entries] if piece.dimension == 0 else tensor[:, entries]
    elif row is not None:
        tensor, dimensions = tensors.get_slice(part.name), part.destination.ndim
        found = tensor.get_shape()
        if len(found) != dimensions + 1 or found[0] <= row:
            raise _other_shape(part, found, f"{dimensions} dimensions for each of {row + 1} or more experts")
        source = tensor[row]
    else:
        source = tensors.get_tensor(part.name)
    return source


def _other_shape(part: Part, found: list[int], expected: object) -> ModelError:
    return ModelError(f"{part.name}: shape {found}, expected {expected}; config.json is of another model")


def fill_with_random(parts: Sequence[Part], seed: int = 0) -> None:
    """Draw every part on its device from a generator seeded by its name: all plans and ranks describe one model."""
    if not parts:
        return
    generator = torch.Generator(device=parts[0].destination.device)
    for part in parts:
        if part.name.endswith("norm.weight"):
            part.destination.fill_(1)
        else:
            generator.manual_seed((zlib.crc32(part.key.encode()) << 16) + seed)
            _draw(part, generator)


def _draw(part: Part, generator: torch.Generator) -> None:
    destination, piece = part.destination, part.piece
    if piece is None:
        destination.normal_(0, STANDARD_DEVIATION, generator=generator)
        return
    size = list(destination.shape)
    size[piece.dimension] = piece.total
    whole = destination.new_empty(size).normal_(0, STANDARD_DEVIATION, generator=generator)
    destination.copy_(whole.narrow(piece.dimension, piece.start, destination.shape[piece.dimension]))
