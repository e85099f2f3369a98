"""SGLang's ``per_token`` recordings: the experts of every token of every pass, put together to sequences.

Read in SGLang's source: a record has ``input_ids`` and ``positions`` of all tokens of the pass, ``extend_seq_lens``
where it extends sequences, ``forward_mode`` (1 extend, 2 decode, 3 both, 4 idle) and ``topk_ids_of_layer`` int32
``[R, T, 8]``, filled with −1 where no router wrote: dense layers, choices beyond the model's K, padding. The ids are
physical slots: the recorder counts them as such.

Inferred, because a record names no requests: a decode pass lists the running sequences in the order of the pass before,
less those that ended, with newly prefilled ones behind, so each row continues the next sequence that has reached its
position. A prompt cut in chunks is the last segment of one pass and the first of the next. Where the rows of a
rank hold no ids for tokens that it lists, the tokens were scattered among ranks and their order is lost.

Source: https://github.com/sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py,
python/sglang/srt/model_executor/forward_batch_info.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.checks import TOO_LARGE, check_routes, integer_array, mapped_experts, moe_rows
from profiler.importers.recording import (
    ModelFacts,
    RecordedRoutes,
    RecordedSequence,
    RecordingError,
    Remarks,
    routes_of,
)

_EXTEND, _DECODE, _MIXED, _IDLE = 1, 2, 3, 4
_PADDING = "tokens of padding cut"


@dataclass(frozen=True)
class _Pass:
    """One forward pass of one rank.

    Attributes:
        mode: SGLang's forward mode.
        token_ids, positions: int64 ``[T]``, real tokens alone.
        lengths: tokens of every segment that was extended; empty in a decode pass.
        slots: integer ``[R, T, 8]``, physical ids, −1 where there are none.
    """

    mode: int
    token_ids: np.ndarray
    positions: np.ndarray
    lengths: list[int]
    slots: np.ndarray


@dataclass
class _Running:
    """A sequence that may go on: its index, and the position it has reached."""

    index: int
    reached: int


class _Sequences:
    """Follows the sequences of one rank from pass to pass."""

    def __init__(self) -> None:
        self.count = 0
        self.begun_before = 0
        self._running: list[_Running] = []
        self._chunk: _Running | None = None  # the last segment of the last extending pass, perhaps to be continued

    def extend(self, positions: np.ndarray, lengths: list[int], mixed: bool) -> tuple[np.ndarray, np.ndarray]:
        """Assign the tokens of a pass that extends sequences.

        Returns:
            The sequence of every token, int64 ``[T]``, and whether it was decoded, bool ``[T]``.
        """
        starts = np.cumsum([0, *lengths[:-1]])
        owners, decoded = [], []
        chunk, self._chunk = self._chunk, None
        taken: set[int] = set()
        for segment, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            position = int(positions[start])
            continued = chunk if segment == 0 and chunk is not None and chunk.reached == position > 0 else None
            match = self._find(position, 0, taken) if mixed and length == 1 and continued is None else None
            if match is not None:
                taken.add(match)
                owner = self._running[match]
            else:
                owner = continued or self._begin(position)
                self._chunk = owner
                if continued is None:
                    self._running.append(owner)
            owner.reached = position + length
            owners += [owner.index] * length
            decoded += [match is not None] * length
        return np.array(owners, np.int64), np.array(decoded, bool)

    def decode(self, positions: np.ndarray) -> np.ndarray:
        """Assign the tokens of a decode pass, one per running sequence; whoever is not listed has ended.

        Returns:
            The sequence of every token, int64 ``[T]``.
        """
        taken: set[int] = set()
        listed: list[_Running] = []
        cursor = 0
        for position in positions.tolist():
            match = self._find(position, cursor, taken)
            if match is None:
                self.begun_before += 1
                listed.append(self._begin(position))
            else:
                taken.add(match)
                cursor = match + 1
                listed.append(self._running[match])
            listed[-1].reached = position + 1
        if self._chunk is not None and self._chunk in listed:
            self._chunk = None
        self._running = listed if self._chunk is None else [*listed, self._chunk]
        return np.array([owner.index for owner in listed], np.int64)

    def _find(self, position: int, cursor: int, taken: set[int]) -> int | None:
        for index in chain(range(cursor, len(self._running)), range(cursor)):
            if index not in taken and self._running[index].reached == position > 0:
                return index
        return None

    def _begin(self, position: int) -> _Running:
        self.count += 1
        return _Running(self.count - 1, position)


def read_tokens(
    documents: Iterator[tuple[Path, Mapping[str, Any]]], facts: ModelFacts, remarks: Remarks
) -> RecordedRoutes:
    """Sequences of all files, one rank after the other.

    Args:
        documents: files and what they hold, ``records`` and ``last_physical_to_logical_map``.
        facts: the model.
        remarks: what was left out.

    Raises:
        RecordingError: a pass is damaged, speculative, scattered, or of another model.
    """
    path, document = next(documents)
    passes = (_read_pass(record, f"{path}, record {n}", Remarks()) for n, record in enumerate(document["records"]))
    first = next((one for one in passes if one is not None), None)
    if first is None:
        raise RecordingError(f"{path}: holds no pass with tokens; record while requests are served")
    used = first.slots.max(axis=(1, 2)) >= 0
    rows, layer_ids = moe_rows(len(used), "decoder layers", used, facts, str(path))
    top_k = facts.agree("top_k", int((first.slots[rows] >= 0).any(axis=(0, 1)).sum()), str(path))
    map_RP = integer_array(document["last_physical_to_logical_map"], 2, f"{path}: last_physical_to_logical_map")
    num_experts = facts.agree("num_experts", mapped_experts(map_RP, str(path)), str(path))
    remarks.say("requests are not named in the recording: sequences are put together by position and order")

    def sequences() -> Iterator[RecordedSequence]:
        for source, held in chain([(path, document)], documents):
            reader = _FileReader(source, held, rows, layer_ids, top_k, num_experts)
            yield from reader.sequences(remarks)

    return routes_of(sequences(), num_experts, layer_ids, str(path))


@dataclass(frozen=True)
class _FileReader:
    """Reads the sequences of one file; rows, layers and K are those of the first file."""

    path: Path
    document: Mapping[str, Any]
    rows: np.ndarray
    layer_ids: tuple[int, ...]
    top_k: int
    num_experts: int

    def sequences(self, remarks: Remarks) -> Iterator[RecordedSequence]:
        """All sequences, in the order they began."""
        what = f"{self.path}: last_physical_to_logical_map"
        map_RP = integer_array(self.document["last_physical_to_logical_map"], 2, what)
        follow = _Sequences()
        parts: list[tuple[np.ndarray, ...]] = []
        for number, record in enumerate(self.document["records"]):
            where = f"{self.path}, record {number}"
            one = _read_pass(record, where, remarks)
            if one is None:
                continue
            experts = self._logical(one.slots, map_RP, where)
            if one.mode == _DECODE:
                owners, decoded = follow.decode(one.positions), np.ones(len(one.positions), bool)
            else:
                owners, decoded = follow.extend(one.positions, one.lengths, one.mode == _MIXED)
            parts.append((owners, experts, one.positions, decoded, one.token_ids))
        remarks.count("sequences whose beginning was not recorded", follow.begun_before)
        if not parts:
            return
        owners, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(owners, kind="stable")
        ends = np.cumsum(np.bincount(owners, minlength=follow.count))
        for tokens in np.split(order, ends[:-1]):
            experts, positions, decoded, token_ids = (column[tokens] for column in columns)
            yield RecordedSequence(experts, positions, decoded, token_ids)

    def _logical(self, slots: np.ndarray, map_RP: np.ndarray, where: str) -> np.ndarray:
        """Logical experts uint16 ``[T, L, K]`` of a pass."""
        if len(slots) != len(map_RP) or slots.max() >= map_RP.shape[1] or len(map_RP) <= self.rows[-1]:
            raise RecordingError(
                f"{where}: {len(slots)} layers with slots up to {slots.max()}, the map has {list(map_RP.shape)} layers "
                "and slots; record it again, without fused shared experts"
            )
        others = np.delete(slots, self.rows, axis=0)
        if (others >= 0).any():
            raise RecordingError(f"{where}: routes in a layer that is not MoE; name the model of the recording")
        chosen = slots[self.rows]
        if (chosen[:, :, : self.top_k] < 0).any() or (chosen[:, :, self.top_k :] >= 0).any():
            raise RecordingError(
                f"{where}: not every token has {self.top_k} experts in every MoE layer; give the model's own --layers, "
                "or record it again"
            )
        chosen = chosen[:, :, : self.top_k].astype(np.int64)
        experts = map_RP[self.rows[:, None, None], chosen].transpose(1, 0, 2)
        check_routes(experts, self.num_experts, self.layer_ids, where)
        return experts.astype(np.uint16)


def _read_pass(record: Mapping[str, Any], where: str, remarks: Remarks) -> _Pass | None:
    """One record without its padding, or None where it holds no token."""
    mode = record.get("forward_mode")
    slots = integer_array(record.get("topk_ids_of_layer"), 3, f"{where}: topk_ids_of_layer")
    token_ids = integer_array(record.get("input_ids"), 1, f"{where}: input_ids")
    positions = integer_array(record.get("positions"), 1, f"{where}: positions")
    if not isinstance(mode, int) or mode not in (_EXTEND, _DECODE, _MIXED, _IDLE):
        raise RecordingError(
            f"{where}: forward mode {mode!r} is not extend, decode or both; record without speculative decoding"
        )
    if not len(token_ids) == len(positions) == slots.shape[1]:
        raise RecordingError(
            f"{where}: {len(token_ids)} tokens, {len(positions)} positions and routes of {slots.shape[1]} tokens, "
            "expected as many of each; record it again"
        )
    for name, column in (("positions", positions), ("input_ids", token_ids)):
        if column.size and not 0 <= column.min() <= column.max() < TOO_LARGE:
            raise RecordingError(
                f"{where}: {name} from {column.min()} to {column.max()}, expected 0 to {TOO_LARGE - 1}; record it again"
            )
    routed = slots.max(axis=(0, 2), initial=-1) >= 0
    lengths: list[int] = []
    if mode == _IDLE:
        real = np.zeros(len(positions), bool)
    elif mode == _DECODE:
        real = routed | (positions > 0)
    else:
        lengths = integer_array(record.get("extend_seq_lens"), 1, f"{where}: extend_seq_lens").tolist()
        if min(lengths, default=0) < 0 or sum(lengths) > len(positions):
            raise RecordingError(f"{where}: segments of {lengths[:8]} tokens in a pass of {len(positions)}")
        lengths = [length for length in lengths if length]
        real = np.arange(len(positions)) < sum(lengths)
        _check_segments(positions, lengths, where)
    if not routed[real].all():
        raise RecordingError(
            f"{where}: no routes for {(~routed[real]).sum()} of {real.sum()} tokens: they were scattered among ranks, "
            "and their order is lost; record with data-parallel attention on every rank (--enable-dp-attention, "
            "--dp-size equal to --tp-size), or in the mode per_pass"
        )
    remarks.count(_PADDING, int((~real).sum()))
    if not real.any():
        return None
    return _Pass(int(mode), token_ids[real], positions[real].astype(np.int64), lengths, slots[:, real])


def _check_segments(positions: np.ndarray, lengths: list[int], where: str) -> None:
    """Every segment counts its positions up one by one."""
    jumps = np.flatnonzero(np.diff(positions[: sum(lengths)]) != 1) + 1
    if not np.isin(jumps, np.cumsum(lengths)).all():
        raise RecordingError(f"{where}: positions jump within a segment, expected them to rise by one; record it again")
