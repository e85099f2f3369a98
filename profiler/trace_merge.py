"""Merges traces of one model into one.

Plans are solved on sequences with an even id and judged on those with an odd one. So every sequence gets the next
free id of its own parity: what was held out stays held out, and ids stay as dense as the inputs' parities allow. The
first trace, where its ids are 0, 1, 2, …, keeps them.

Shape suffixes: T tokens of a trace, S its sequences.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiler.errors import InputError, TraceError
from profiler.sequence_runs import sequence_runs
from profiler.trace_copy import Layout, NewTrace, Piece, read_layout, write_traces
from profiler.trace_format import RoutingTrace
from profiler.trace_header import require_output

REBUILT_KEYS = ("domains", "source")
# Equal as values where the traces are of one model, though perhaps not as text.
CHECKED_KEYS = ("num_experts", "layer_ids")


@dataclass(frozen=True)
class _Input:
    """What merging must know of a trace, once its file is closed again."""

    trace: RoutingTrace
    layout: Layout
    ids_S: np.ndarray
    lengths_S: np.ndarray


def merge_traces(paths: Sequence[Path], output: Path) -> list[str]:
    """Write one trace with the tokens of all, in the order given.

    Optional tensors are kept if every trace has them. Metadata on which all traces that have it agree is kept,
    sources are joined, and where one trace names domains, the sequences of those that name none get the domain ``""``.

    Args:
        paths: two or more traces, each once.
        output: the trace to write.

    Returns:
        Notes on what could not be kept, one line each.

    Raises:
        InputError: fewer than two traces, one is named twice, or they are not of one model.
        TraceError: a trace cannot be read, or the output cannot be written.
    """
    if len(paths) < 2:
        raise InputError(f"merge got {len(paths)} trace, expected two or more; name all that belong together")
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(paths):
        if resolved[index] in resolved[:index]:
            raise InputError(f"{path}: is named twice, and its tokens would count twice; name every trace once")
    require_output(output, paths)
    _require_same_model([_closed(path) for path in paths])  # by their headers, before any is read through
    inputs = [_read(path) for path in paths]
    metadata, notes = _join_metadata([each.trace for each in inputs])
    layout, dropped = _join_layouts(inputs)
    new_ids = _renumber([each.ids_S for each in inputs])
    domains = _join_domains(inputs, new_ids)
    if domains is not None:
        metadata["domains"] = json.dumps(domains)
    pieces = [
        Piece(each.trace.path, each.trace.num_tokens, sequence_T=np.repeat(ids_S, each.lengths_S))
        for each, ids_S in zip(inputs, new_ids, strict=True)
    ]
    write_traces(output.parent, [NewTrace(output, pieces, layout, metadata)])
    return notes + dropped


def _closed(path: Path) -> RoutingTrace:
    """A trace whose header was read and whose file is closed again."""
    with RoutingTrace.open(path, validate=False) as trace:
        return trace


def _read(path: Path) -> _Input:
    with RoutingTrace.open(path) as trace:
        return _Input(trace, read_layout(trace), *sequence_runs(trace.sequence()))


def _require_same_model(traces: Sequence[RoutingTrace]) -> None:
    """Refuse traces that cannot be one model's; a fingerprint that is missing fits any."""
    first = traces[0]
    for other in traces[1:]:
        for name, expected, found in (
            ("num_experts", first.num_experts, other.num_experts),
            ("top_k", first.top_k, other.top_k),
            ("layer_ids", list(first.layer_ids), list(other.layer_ids)),
        ):
            _require_equal(name, first, expected, other, found)
    fingerprinted = [trace for trace in traces if trace.model_fingerprint is not None]
    for other in fingerprinted[1:]:
        first = fingerprinted[0]
        _require_equal("model_fingerprint", first, first.model_fingerprint, other, other.model_fingerprint)


def _require_equal(name: str, first: RoutingTrace, expected: object, other: RoutingTrace, found: object) -> None:
    if found != expected:
        raise TraceError(
            f"{other.path}: {name} is {found}, but {expected} in {first.path}; merge traces of one model only"
        )


def _join_metadata(traces: Sequence[RoutingTrace]) -> tuple[dict[str, str], list[str]]:
    """The metadata of all but ``domains``, and notes on what they do not agree on."""
    joined: dict[str, str] = {}
    notes = []
    for key in sorted({key for trace in traces for key in trace.metadata if key not in REBUILT_KEYS}):
        values = list(dict.fromkeys(trace.metadata[key] for trace in traces if key in trace.metadata))
        if len(values) == 1 or key in CHECKED_KEYS:
            joined[key] = values[0]
        elif key == "model":
            joined[key] = values[0]
            notes.append(f"the traces name the model {', '.join(values)}; the first name is kept")
        else:
            notes.append(f"{key} is dropped: the traces differ in it ({', '.join(values)})")
    sources = dict.fromkeys(trace.metadata["source"] for trace in traces if trace.metadata.get("source"))
    return joined | ({"source": "; ".join(sources)} if sources else {}), notes


def _join_layouts(inputs: Sequence[_Input]) -> tuple[Layout, list[str]]:
    """The tensors that every trace has, each with the dtype that holds all, and notes on those that are dropped."""
    joined = {}
    notes = []
    for name in dict.fromkeys(name for each in inputs for name in each.layout):
        lacking = [each.trace.path for each in inputs if name not in each.layout]
        if lacking:
            notes.append(f"{name} is dropped: {len(lacking)} of {len(inputs)} traces have none, as {lacking[0]}")
            continue
        dtypes = [each.layout[name][0] for each in inputs]
        joined[name] = (np.result_type(*dtypes), inputs[0].layout[name][1])
    return joined, notes


def _renumber(ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For every trace's ids, int32 ``[S]``, the next free ids of the same parity, int32 ``[S]``."""
    taken = [0, 0]
    renumbered = []
    for ids_S in ids:
        new_S = np.empty_like(ids_S)
        for parity in (0, 1):
            mine_S = ids_S % 2 == parity
            count = int(np.count_nonzero(mine_S))
            new_S[mine_S] = 2 * np.arange(taken[parity], taken[parity] + count) + parity
            taken[parity] += count
        renumbered.append(new_S)
    return renumbered


def _join_domains(inputs: Sequence[_Input], new_ids: Sequence[np.ndarray]) -> list[str] | None:
    """One name per new id, ``""`` where there is none; None where no trace names domains."""
    if all(each.trace.domains is None for each in inputs):
        return None
    joined = [""] * (1 + max(int(ids_S.max()) for ids_S in new_ids))
    for each, new_S in zip(inputs, new_ids, strict=True):
        if each.trace.domains is not None:
            for old, new in zip(each.ids_S.tolist(), new_S.tolist(), strict=True):
                joined[new] = each.trace.domains[old]
    return joined
