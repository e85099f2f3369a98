"""vLLM: routes in its responses, and load statistics of its balancer; both are JSON lines.

Responses of a server started with ``--enable-return-routed-experts``, in two forms. Version 0.21 documents
``prompt_routed_experts`` ``[prompt, L, K]`` beside the choices and ``routed_experts`` ``[generated, L, K]`` in each.
Later versions have ``routed_experts`` of prompt and generated tokens in each choice, as base64 of a ``.npy`` file (pull
request 44638), uint8, uint16 or int32. Nested lists and ``.npy`` text are read in either form. Layers are MoE
layers in the documentation and all decoder layers in its recorder; both are taken, by their number.

Load statistics are those of the open proposal 41141: per record ``expert_load`` and ``p2l_map`` ``[L, P]``, whose own
tool sums the records, each through its own map. Lines of another ``record_type`` are passed over.

Source: https://docs.vllm.ai/en/v0.21.0/training/routed_experts_replay/ and
https://github.com/vllm-project/vllm, pull requests 38939, 44638 and 41141.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.checks import NPY_ERRORS, finish_counts, integer_array, logical_counts, moe_rows, take_rows
from profiler.importers.recording import (
    ModelFacts,
    RecordedCounts,
    RecordedRoutes,
    RecordedSequence,
    RecordingError,
    Remarks,
    routes_of,
)
from profiler.importers.responses import Answer, answer_sequence, read_answer, read_lines

_PROMPT, _CHOICE = "prompt_routed_experts", "routed_experts"
_STATISTICS = "eplb_load_stats"

Lines = Iterator[tuple[str, Mapping[str, Any]]]


def read(paths: Sequence[Path], facts: ModelFacts, remarks: Remarks) -> RecordedRoutes | RecordedCounts:
    """Responses or load statistics, as the first line has it.

    Raises:
        RecordingError: a line is damaged, of the other kind, or of another model.
    """
    lines = read_lines(paths)
    first = next(lines, None)
    if first is None:
        raise RecordingError(f"{paths[0]}: is empty; give one response, or one record of statistics, per line")
    read_all = _read_statistics if "record_type" in first[1] else _read_responses
    return read_all(chain([first], lines), str(paths[0]), facts, remarks)


def _read_statistics(lines: Lines, source: str, facts: ModelFacts, remarks: Remarks) -> RecordedCounts:
    total: np.ndarray | None = None
    for where, record in lines:
        if record.get("record_type") != _STATISTICS:
            remarks.count("records of another type passed over")
            continue
        if record.get("version") != 1:
            raise RecordingError(f"{where}: version {record.get('version')!r} of {_STATISTICS}, expected 1")
        load = integer_array(record.get("expert_load"), 2, f"{where}: expert_load")
        counts = logical_counts(load, integer_array(record.get("p2l_map"), 2, f"{where}: p2l_map"), where)
        if total is not None and counts.shape != total.shape:
            raise RecordingError(
                f"{where}: {list(counts.shape)} layers and experts, {list(total.shape)} before; give one model's"
            )
        total = counts if total is None else total + counts
    if total is None:
        raise RecordingError(f"{source}: holds no record of type {_STATISTICS}; give the balancer's statistics")
    return finish_counts(total, "MoE layers", facts, source)


def _read_responses(lines: Lines, source: str, facts: ModelFacts, remarks: Remarks) -> RecordedRoutes:
    if facts.layer_ids is None or facts.num_experts is None:
        raise RecordingError(
            f"{source}: responses name neither layers nor experts; add --like with a trace or a model, or "
            "--num-experts and --layers"
        )
    layer_ids, num_experts = facts.layer_ids, facts.num_experts

    def sequences() -> Iterator[RecordedSequence]:
        top_k = facts.top_k
        for where, body in lines:
            answer = read_answer(body, where)
            for index in range(len(answer.choices)):
                rows_TRK, told = _routes(answer, index)
                if top_k not in (None, rows_TRK.shape[2]):
                    raise RecordingError(
                        f"{where}: {rows_TRK.shape[2]} experts per token, expected {top_k}; name the recording's model"
                    )
                top_k = rows_TRK.shape[2]
                kept, _ = moe_rows(rows_TRK.shape[1], "either", None, facts, where)
                sequence = answer_sequence(
                    told, index, take_rows(rows_TRK, kept, facts, where), facts, layer_ids, remarks
                )
                if sequence is not None:
                    yield sequence

    return routes_of(sequences(), num_experts, layer_ids, source)


def _routes(answer: Answer, index: int) -> tuple[np.ndarray, Answer]:
    """Integer ``[T, R, K]`` of one choice, prompt and generated tokens together, and the answer with its lengths."""
    of_prompt, of_choice = answer.body.get(_PROMPT), answer.choices[index].get(_CHOICE)
    if of_choice is None and of_prompt is None:
        raise RecordingError(f"{answer.where}: holds no {_CHOICE}; start vLLM with --enable-return-routed-experts")
    names = ((_PROMPT, of_prompt), (_CHOICE, of_choice))
    parts = [_decode(value, f"{answer.where}: {name}") for name, value in names if value is not None]
    if len({part.shape[1:] for part in parts if part.size}) > 1:
        raise RecordingError(f"{answer.where}: prompt and generated tokens differ in layers or experts per token")
    filled = [part for part in parts if part.size]
    if not filled:
        raise RecordingError(f"{answer.where}: {_CHOICE} is empty; keep the response as it came")
    together = np.concatenate(filled)
    if of_prompt is None:
        return together, answer
    if answer.seen_tokens is not None:
        # The generated tokens' last row may stand for the last token, which was never fed.
        together = together[: max(answer.seen_tokens, len(parts[0]))]
    prompt = answer.prompt_tokens if answer.prompt_tokens is not None else len(parts[0])
    return together, replace(answer, prompt_tokens=prompt, seen_tokens=prompt + len(together) - len(parts[0]))


def _decode(value: Any, what: str) -> np.ndarray:
    """Integer ``[T, R, K]`` from nested lists, or from base64 of a ``.npy`` file; never a pickle."""
    if not isinstance(value, str):
        array = integer_array(value, None, what)
    else:
        try:
            raw = io.BytesIO(base64.b64decode(value, validate=True))
            array = integer_array(np.lib.format.read_array(raw, allow_pickle=False), None, what)
        except RecordingError:
            raise
        except NPY_ERRORS as error:
            raise RecordingError(
                f"{what} is not base64 of a .npy file of integers; keep the response as it came"
            ) from error
    if array.ndim != 3 and array.size:
        raise RecordingError(f"{what} has shape {list(array.shape)}, expected [tokens, layers, experts per token]")
    return array.astype(np.int64) if array.ndim == 3 else np.zeros((0, 0, 0), np.int64)
