"""Divides a trace's tokens among several traces, or keeps some of them.

Sequences keep their ids, so that a sequence is held out in a part of a trace exactly if it is in the whole: a plan
solved on a sample can be judged on the trace it was drawn from, and a token is found again by sequence and position.
Where that leaves a part with even or odd ids alone, ``renumber`` counts them anew.

Shape suffixes: T tokens, S sequences.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from math import isclose
from pathlib import Path

import numpy as np

from profiler.errors import InputError, TraceError
from profiler.sequence_runs import sequence_runs
from profiler.statistics import domain_of_tokens
from profiler.trace_copy import NewTrace, Piece, read_layout, write_traces
from profiler.trace_format import RoutingTrace
from profiler.trace_header import output_errors, require_output

LONGEST_PART_NAME = 40  # characters


@dataclass(frozen=True)
class Partition:
    """Which part every token of a trace belongs to; no part is empty.

    Attributes:
        names: of the parts.
        part_T: integer ``[T]``, index of a token's part.
    """

    names: tuple[str, ...]
    part_T: np.ndarray


def by_domain(trace: RoutingTrace) -> Partition:
    """One part per domain that has tokens, in the order in which the trace lists them.

    Raises:
        TraceError: the trace names no domains.
    """
    names, domain_T = domain_of_tokens(trace)
    return Partition(tuple(names), domain_T)


def by_phase(trace: RoutingTrace) -> Partition:
    """Prefill and decode.

    Raises:
        TraceError: the trace holds only one of them.
    """
    names = ("prefill", "decode")
    decode_T = trace.decode()
    for phase, name in enumerate(names):
        if not (decode_T == phase).any():
            raise TraceError(f"{trace.path}: has no {name} tokens, so there is nothing to split by phase")
    return Partition(names, decode_T)


def by_sequence(trace: RoutingTrace, shares: Sequence[float], seed: int = 0) -> Partition:
    """Sequences dealt out at random.

    Args:
        trace: an open trace.
        shares: of the sequences, per part; they add up to 1.
        seed: of the draw.

    Raises:
        InputError: the shares are not positive or do not add up to 1, or the seed is negative.
        TraceError: a part would hold no sequence.
    """
    if not all(share > 0 for share in shares) or not isclose(sum(shares), 1, abs_tol=2e-3):
        listed = ",".join(f"{share:g}" for share in shares)
        raise InputError(f"parts {listed} add up to {sum(shares):g}, expected positive shares that add up to 1")
    lengths_S = sequence_runs(trace.sequence())[1]
    num_sequences = len(lengths_S)
    cuts = np.round(np.cumsum(shares) / sum(shares) * num_sequences).astype(np.int64)
    sizes = np.diff(cuts, prepend=0)
    if sizes.min() < 1:
        raise TraceError(
            f"{trace.path}: part {sizes.argmin() + 1} of {len(shares)} would hold none of the {num_sequences} "
            "sequences; name fewer or more even parts"
        )
    part_S = np.empty(num_sequences, np.int32)
    part_S[generator_of(seed).permutation(num_sequences)] = np.repeat(np.arange(len(shares)), sizes)
    return Partition(tuple(f"part{n}" for n in range(1, len(shares) + 1)), np.repeat(part_S, lengths_S))


def generator_of(seed: int) -> np.random.Generator:
    """Random numbers of a seed; InputError where it is negative."""
    if seed < 0:
        raise InputError(f"seed is {seed}, expected a whole number >= 0")
    return np.random.default_rng(seed)


def split_trace(trace: RoutingTrace, partition: Partition, folder: Path, renumber: bool = False) -> list[Path]:
    """Write every part to a file ``<trace>-<part>.safetensors`` of its own: all of them, or none.

    Args:
        trace: an open trace.
        partition: its parts.
        folder: where to write; made where there is none, unless its own folder is missing.
        renumber: number each part's sequences 0, 1, 2, …, instead of keeping their ids.

    Returns:
        The files, in the order of the parts.

    Raises:
        TraceError: a file cannot be written, or one of that name is there already.
    """
    if folder.exists() and not folder.is_dir():
        raise TraceError(f"{folder}: is a file; name a folder to write the parts into")
    missing = not folder.exists()
    if missing:
        require_output(folder)
        with output_errors(folder):
            folder.mkdir()
    try:
        paths = [folder / f"{trace.path.stem}-{name}.safetensors" for name in safe_names(partition.names)]
        for path in paths:
            if path.exists():
                raise TraceError(f"{path}: exists already; remove it, or name another folder")
            require_output(path)
        masks = (partition.part_T == part for part in range(len(partition.names)))
        write_traces(folder, _selections(trace, paths, masks, renumber))
    except BaseException:
        if missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    return paths


def write_selection(trace: RoutingTrace, keep_T: np.ndarray, output: Path, renumber: bool = False) -> None:
    """Write some tokens of a trace, in their order, as a trace.

    Args:
        trace: an open trace.
        keep_T: bool ``[T]``, at least one token.
        output: the trace to write.
        renumber: number the sequences 0, 1, 2, …, instead of keeping their ids.

    Raises:
        TraceError: the output cannot be written, or is the trace itself.
    """
    require_output(output, [trace.path])
    write_traces(output.parent, _selections(trace, [output], [keep_T], renumber))


def _selections(
    trace: RoutingTrace, paths: Sequence[Path], masks: Iterable[np.ndarray], renumber: bool
) -> Iterator[NewTrace]:
    """What to write, one output at a time, so that one mask at a time is held."""
    for path, keep_T in zip(paths, masks, strict=True):
        metadata, sequence_T = dict(trace.metadata), None
        if renumber:
            ids_S, lengths_S = sequence_runs(trace.sequence()[keep_T])
            sequence_T = np.zeros(trace.num_tokens, np.int32)
            sequence_T[keep_T] = np.repeat(np.arange(len(ids_S)), lengths_S)
            if trace.domains is not None:
                metadata["domains"] = json.dumps([trace.domains[sequence] for sequence in ids_S.tolist()])
        piece = Piece(trace.path, int(np.count_nonzero(keep_T)), keep_T, sequence_T)
        yield NewTrace(path, [piece], read_layout(trace), metadata)


def safe_names(names: Sequence[str]) -> list[str]:
    """Names that are safe as parts of file names, and differ even where capitals do not count.

    Letters, digits, ``-`` and ``_`` stay; a name that is taken already gets a number.
    """
    taken: set[str] = set()
    safe = []
    for name in names:
        kept = (letter if letter.isalnum() or letter in "-_" else "_" for letter in name[:LONGEST_PART_NAME])
        base = "".join(kept).strip("_") or "unnamed"
        for candidate in chain([base], (f"{base}-{number}" for number in count(2))):
            key = unicodedata.normalize("NFKC", candidate).casefold()
            if key not in taken:
                break
        taken.add(key)
        safe.append(candidate)
    return safe
