"""Checks that engines' recordings share: which rows are MoE layers, which ids are experts, which slots are copies.

Shape suffixes: T tokens, L MoE layers, R rows of a recording (some engines have one for every decoder layer), E logical
experts, P physical slots, K choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from profiler.importers.recording import ModelFacts, RecordedCounts, RecordingError

#: What numpy raises for a damaged ``.npy`` file; it evaluates the header as Python's literals, hence the syntax.
NPY_ERRORS = (
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TokenError,
)

#: Beyond what a trace's positions and token ids can hold.
TOO_LARGE = 2**31

#: Which layers an engine's rows stand for.
Rows = Literal["decoder layers", "MoE layers", "either"]

_SHOWN_CHARACTERS = 60


def moe_rows(
    num_rows: int, meaning: Rows, used: np.ndarray | None, facts: ModelFacts, where: str
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Which rows of a recording are MoE layers, and which decoder layers they are.

    Where the model's layers are not known, those rows of all decoder layers that were used are the MoE layers.

    Args:
        num_rows: R.
        meaning: whether the engine has a row for every decoder layer, for MoE layers alone, or either.
        used: bool ``[R]``, rows with any route or count; None where the recording cannot tell.
        facts: the model.
        where: file, for messages.

    Returns:
        Row indices int64 ``[L]``, and the decoder layers.

    Raises:
        RecordingError: the rows are not those of this model, or a MoE layer was not recorded.
    """
    if facts.layer_ids is None:
        if used is None or meaning != "decoder layers":
            raise RecordingError(f"{where}: does not tell which decoder layers are MoE; add --layers, such as 3-60")
        if not used.any():
            raise RecordingError(f"{where}: holds no routes; record while requests are served")
        rows = np.flatnonzero(used)
        return rows, tuple(int(row) for row in rows)
    layer_ids = np.asarray(facts.layer_ids)
    if num_rows == len(layer_ids) and meaning != "decoder layers":
        rows = np.arange(num_rows)
    elif layer_ids[-1] < num_rows == (facts.num_layers or num_rows) and meaning != "MoE layers":
        rows = layer_ids
    else:
        raise RecordingError(
            f"{where}: has {num_rows} rows of layers, {facts.model} has {len(layer_ids)} MoE layers up to "
            f"layer {layer_ids[-1]}: a recording of another model; name its own model"
        )
    if used is not None:
        beyond = np.setdiff1d(np.flatnonzero(used), rows)
        if len(beyond):
            raise RecordingError(
                f"{where}: row {beyond[0]} holds routes, but layer {beyond[0]} of {facts.model} is not MoE: a "
                "recording of another model; name its own model"
            )
        require_recorded(used[rows], facts.layer_ids, where)
    return rows, facts.layer_ids


def take_rows(rows_TRK: np.ndarray, rows: np.ndarray, facts: ModelFacts, where: str) -> np.ndarray:
    """The MoE layers of routes with a row for every decoder layer; a dense layer's row holds 0 or −1 alone.

    Returns:
        Integer ``[T, L, K]``.

    Raises:
        RecordingError: a layer that is not MoE has routes.
    """
    routed = np.delete(rows_TRK, rows, axis=1) > 0
    if routed.any():
        layer = np.setdiff1d(np.arange(rows_TRK.shape[1]), rows)[np.flatnonzero(routed.any(axis=(0, 2)))[0]]
        raise RecordingError(
            f"{where}: routes in layer {layer}, which is not MoE in {facts.model}; name the model of the recording, "
            "with its own --layers"
        )
    return rows_TRK[:, rows]


def require_recorded(used: np.ndarray, layer_ids: tuple[int, ...], where: str) -> None:
    """Refuse a recording in which a MoE layer got no token at all.

    Args:
        used: bool ``[L]``.
        layer_ids: the decoder layers.
        where: file, for the message.
    """
    unused = np.flatnonzero(~used)
    if len(unused):
        raise RecordingError(
            f"{where}: holds nothing of MoE layer {layer_ids[unused[0]]} ({len(unused)} of {len(layer_ids)} layers); "
            "give the files of all ranks, or the right --layers"
        )


def check_routes(experts_TLK: np.ndarray, num_experts: int, layer_ids: tuple[int, ...], where: str) -> None:
    """Refuse ids that are no logical expert, or the same expert twice for one token.

    Raises:
        RecordingError: naming the first such id.
    """
    wrong = (experts_TLK < 0) | (experts_TLK >= num_experts)
    if wrong.any():
        token, layer, choice = np.argwhere(wrong)[0]
        raise RecordingError(
            f"{where}: expert {experts_TLK[token, layer, choice]} in layer {layer_ids[layer]}, expected 0 to "
            f"{num_experts - 1}; name the model of the recording, and record without fused shared experts"
        )
    ordered = np.sort(experts_TLK, axis=2)
    repeated = ordered[:, :, 1:] == ordered[:, :, :-1]
    if repeated.any():
        token, layer, choice = np.argwhere(repeated)[0]
        raise RecordingError(
            f"{where}: expert {ordered[token, layer, choice]} twice for one token in layer {layer_ids[layer]}, "
            f"expected {experts_TLK.shape[2]} distinct experts; name the model of the recording, with its own --layers"
        )


def mapped_experts(map_RP: np.ndarray, where: str) -> int:
    """Logical experts (E) that a map of slots names: each has a slot at least, so no id can reach the number of slots.

    Raises:
        RecordingError: the map is empty or holds an id that cannot be.
    """
    if not map_RP.size:
        raise RecordingError(f"{where}: its map has no slots; record it again")
    wrong = map_RP[(map_RP < 0) | (map_RP >= map_RP.shape[1])]
    if len(wrong):
        raise RecordingError(
            f"{where}: a slot holds expert {wrong[0]}, expected 0 to at most {map_RP.shape[1] - 1}; record it again"
        )
    return int(map_RP.max()) + 1


def logical_counts(counts_RP: np.ndarray, map_RP: np.ndarray, where: str) -> np.ndarray:
    """Counts of physical slots as counts of logical experts; the copies of an expert are summed.

    Args:
        counts_RP: integer ``[R, P]``.
        map_RP: integer ``[R, P]``, the logical expert of every slot.
        where: file, for messages.

    Returns:
        int64 ``[R, E]``.

    Raises:
        RecordingError: the shapes differ, a count is negative, or the map holds an id that cannot be.
    """
    if counts_RP.shape != map_RP.shape:
        raise RecordingError(
            f"{where}: counts {list(counts_RP.shape)} and the map of slots {list(map_RP.shape)} differ, expected both "
            "[layers, slots]; record it again"
        )
    require_counts(counts_RP, where)
    logical = np.zeros((len(map_RP), mapped_experts(map_RP, where)), np.int64)
    np.add.at(logical, (np.arange(len(map_RP))[:, None], map_RP), counts_RP)
    return logical


def require_counts(counts: np.ndarray, where: str) -> None:
    """Refuse negative counts."""
    if counts.size and counts.min() < 0:
        raise RecordingError(f"{where}: holds the count {counts.min()}, expected >= 0; record it again")


def finish_counts(counts_RE: np.ndarray, meaning: Rows, facts: ModelFacts, where: str) -> RecordedCounts:
    """Counts of all rows as counts of the MoE layers alone.

    Raises:
        RecordingError: they do not fit the model, or a MoE layer got nothing.
    """
    facts.agree("num_experts", counts_RE.shape[1], where)
    rows, layer_ids = moe_rows(len(counts_RE), meaning, counts_RE.max(axis=1) > 0, facts, where)
    return RecordedCounts(layer_ids, counts_RE[rows])


def integer_array(value: Any, ndim: int | None, what: str) -> np.ndarray:
    """A tensor or nested list as integers, refused where it is anything else.

    Args:
        value: a tensor, an array or nested lists.
        ndim: dimensions it must have, or None for any.
        what: file and name, for the message.

    Raises:
        RecordingError: it holds no integers, or has other dimensions.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):  # ragged lists, and tensors that numpy cannot hold
        array = np.empty((), object)
    if ndim not in (None, array.ndim) or (array.dtype.kind not in "iu" and array.size):
        expected = "integers" if ndim is None else f"integers in {ndim} dimensions"
        raise RecordingError(
            f"{what}: {array.dtype} of shape {list(array.shape)}, expected {expected}; record it again"
        )
    return array.astype(np.int64) if array.dtype.kind not in "iu" or array.dtype.itemsize == 8 else array


def require_mapping(value: Any, where: str, expected: str) -> Mapping[str, Any]:
    """An object of a document, refused where something else stands."""
    if not isinstance(value, Mapping):
        raise RecordingError(f"{where}: {shown(value)}, expected {expected}")
    return value


def shown(value: object) -> str:
    """A value for a message, on one line and cut where it is long."""
    text = " ".join(repr(value)[: 4 * _SHOWN_CHARACTERS].split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
