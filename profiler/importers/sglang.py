"""SGLang: recordings of its expert distribution recorder (``.pt``), and routes it returned over HTTP (JSON lines).

Read in SGLang's source (commit 02295fe): ``stat`` is summed over all ranks before rank 0 alone writes it, in steps of a
ring buffer whose unused steps are zero. ``per_pass`` and ``per_token`` are one file per rank, with counts and ids of
physical slots and the map of slots at the time of the dump; rows are all decoder layers, and those of dense layers stay
zero (or −1). Tensors may have been saved from a GPU.

Inferred: ranks that share their attention (tensor parallelism without data parallelism) see the same tokens, so that
their files are equal pass by pass; such a file is one more view of the same tokens and is left out. In ``stat`` they
cannot be told apart: there every count is a multiple, which leaves popularity as it is.

Source: https://github.com/sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.checks import (
    finish_counts,
    integer_array,
    logical_counts,
    require_counts,
    require_mapping,
)
from profiler.importers.recording import ModelFacts, RecordedCounts, RecordedRoutes, RecordingError, Remarks
from profiler.importers.sglang_responses import read_responses
from profiler.importers.sglang_tokens import read_tokens

#: Files, and what they hold.
Documents = Iterator[tuple[Path, Mapping[str, Any]]]

_SAME_VIEW = "files left out, equal to another rank's"


def read(paths: Sequence[Path], facts: ModelFacts, remarks: Remarks) -> RecordedRoutes | RecordedCounts:
    """Recordings of one kind, of all ranks and dumps given together.

    Raises:
        RecordingError: a file is damaged, of another kind than the first, or of another model.
    """
    saved = [path for path in paths if path.suffix == ".pt"]
    if not saved:
        return read_responses(paths, facts, remarks)
    if len(saved) < len(paths):
        raise RecordingError(f"{saved[0]} is a recording, others are responses; import the two kinds one by one")
    documents = _distinct(_documents(paths), remarks)
    first = next(documents, None)
    if first is None:
        raise RecordingError(f"{paths[0]}: holds no passes; record while requests are served")
    kind = _kind(*first)
    documents = _of_one_kind(chain([first], documents), kind, first[0])
    return (read_tokens if kind == "per_token" else _read_counts)(documents, facts, remarks)


def _read_counts(documents: Documents, facts: ModelFacts, remarks: Remarks) -> RecordedCounts:
    """Counts of all files together."""
    total: np.ndarray | None = None
    where = ""
    for path, document in documents:
        where = str(path)
        stat = "logical_count" in document
        counts = _stat_counts(document, where) if stat else _pass_counts(document, where)
        if total is not None and counts.shape != total.shape:
            raise RecordingError(
                f"{path}: counts of {list(counts.shape)} layers and experts, the files before have "
                f"{list(total.shape)}; give recordings of one model"
            )
        total = counts if total is None else total + counts
        if stat:
            remarks.say("stat sums over all ranks: where ranks share their tokens, counts are a multiple of the pairs")
    assert total is not None
    return finish_counts(total, "decoder layers", facts, where)


def _stat_counts(document: Mapping[str, Any], where: str) -> np.ndarray:
    """int64 ``[R, E]`` of a file of ``logical_count`` ``[steps, R, E]``."""
    counts = integer_array(document["logical_count"], 3, f"{where}: logical_count")
    require_counts(counts, where)
    return counts.sum(axis=0, dtype=np.int64)


def _pass_counts(document: Mapping[str, Any], where: str) -> np.ndarray:
    """int64 ``[R, E]`` of a file of passes with ``global_physical_count`` ``[R, P]``."""
    map_RP = integer_array(document["last_physical_to_logical_map"], 2, f"{where}: last_physical_to_logical_map")
    total = np.zeros(map_RP.shape, np.int64)
    for index, record in enumerate(document["records"]):
        place = f"{where}, record {index}"
        counts = integer_array(record.get("global_physical_count"), 2, f"{place}: global_physical_count")
        if counts.shape != total.shape:
            raise RecordingError(
                f"{place}: counts of {list(counts.shape)} layers and slots, the map has {list(total.shape)}; record it "
                "again"
            )
        require_counts(counts, place)
        total += counts
    return logical_counts(total, map_RP, where)


def _documents(paths: Sequence[Path]) -> Documents:
    """One file after the other, so that one alone is in memory; a rank without any pass is passed over."""
    for path in paths:
        document = _load(path)
        if _kind(path, document) != "empty":
            yield path, document


def _of_one_kind(documents: Iterable[tuple[Path, Mapping[str, Any]]], kind: str, first: Path) -> Documents:
    for path, document in documents:
        if _kind(path, document) != kind:
            raise RecordingError(
                f"{path}: recorded in the mode {_kind(path, document)}, {first} in {kind}; import them one by one"
            )
        yield path, document


def _distinct(documents: Documents, remarks: Remarks) -> Documents:
    """Without files that are another view of the same passes."""
    seen: set[bytes] = set()
    for path, document in documents:
        digest = _digest(document, path)
        if digest in seen:
            remarks.count(_SAME_VIEW)
            continue
        seen.add(digest)
        yield path, document


def _digest(document: Mapping[str, Any], path: Path) -> bytes:
    """What two ranks have in common that saw the same tokens: passes and counts, but not the rank."""
    digest = hashlib.sha256()
    records = document.get("records") or [document]
    for record in records:
        for name in ("forward_pass_id", "input_ids", "positions", "global_physical_count", "logical_count"):
            if name in record:
                value = integer_array(record[name], None, f"{path}: {name}")
                digest.update(f"{name} {value.shape} {value.dtype};".encode() + value.tobytes())
    return digest.digest()


def _kind(path: Path, document: Mapping[str, Any]) -> str:
    """``stat``, ``per_pass``, ``per_token``, or ``empty`` for a rank without passes."""
    if "logical_count" in document:
        return "stat"
    if "records" not in document or "last_physical_to_logical_map" not in document:
        keys = ", ".join(sorted(map(str, document)))[:100] or "nothing"
        raise RecordingError(
            f"{path}: holds {keys}, expected logical_count, or records and last_physical_to_logical_map; give a dump "
            "of SGLang's expert distribution recorder"
        )
    records = document["records"]
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise RecordingError(f"{path}: records is no list of passes; record it again")
    if not records:
        return "empty"
    return "per_token" if "topk_ids_of_layer" in records[0] else "per_pass"


def _load(path: Path) -> Mapping[str, Any]:
    """A ``.pt`` file; only tensors and plain containers are loaded, never code."""
    import pickle

    try:
        import torch
    except ImportError:
        raise RecordingError(f"{path}: a .pt file needs PyTorch to be read; install torch") from None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read ({error.strerror}); give SGLang's recording") from None
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        OverflowError,
    ) as error:
        raise RecordingError(
            f"{path}: not a .pt file of tensors alone ({type(error).__name__}): damaged, or with code in it; "
            "record it again"
        ) from None
    return require_mapping(document, str(path), "a dump of SGLang's expert distribution recorder")
