"""SGLang's routes over HTTP: base64 of int32 ``[T, R, K]`` without its shape, R all decoder layers.

A server started with ``--enable-return-routed-experts`` answers a request with ``"return_routed_experts": true`` by
``routed_experts``: in ``meta_info`` of ``/generate``, in ``sgl_ext`` of a choice of the OpenAI endpoints. T is
prompt + generated − 1, less ``routed_experts_start_len``.

Read in SGLang's source and documentation: encoding, order of dimensions, and a buffer of zeros with a row for every
decoder layer. Read in a discussion of its source (pull request 17025): the ids are taken behind the map of slots, so
that they are the model's only where a server runs without redundant experts and with the trivial placement.

Source: https://github.com/sgl-project/sglang, python/sglang/srt/layers/moe/routed_experts_capturer.py.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.checks import moe_rows, shown, take_rows
from profiler.importers.recording import (
    ModelFacts,
    RecordedRoutes,
    RecordedSequence,
    RecordingError,
    Remarks,
    routes_of,
)
from profiler.importers.responses import Answer, answer_sequence, read_answer, read_lines

_KEY = "routed_experts"


def read_responses(paths: Sequence[Path], facts: ModelFacts, remarks: Remarks) -> RecordedRoutes:
    """Responses, one sequence each, or one per choice.

    Raises:
        RecordingError: the model's shape is not known, or a response is damaged or of another model.
    """
    where = str(paths[0])
    if facts.layer_ids is None or facts.num_experts is None or facts.top_k is None:
        raise RecordingError(
            f"{where}: responses hold no shapes; add --like with a trace or a model, or --num-experts, --top-k and "
            "--layers"
        )
    top_k, num_experts = facts.top_k, facts.num_experts
    num_rows = facts.num_layers or facts.layer_ids[-1] + 1
    rows, layer_ids = moe_rows(num_rows, "decoder layers", None, facts, where)
    width = num_rows * top_k

    def sequences() -> Iterator[RecordedSequence]:
        for place, body in read_lines(paths):
            answer = read_answer(body, place)
            for index, choice in enumerate(answer.choices):
                flat = _decode(_find(choice, answer), place)
                if not flat.size or flat.size % width:
                    raise RecordingError(
                        f"{place}: {flat.size} ids, expected a multiple of {num_rows} layers times {top_k} "
                        "experts; name the model of the recording"
                    )
                experts = take_rows(flat.reshape(-1, num_rows, top_k), rows, facts, place)
                sequence = answer_sequence(answer, index, experts, facts, layer_ids, remarks)
                if sequence is not None:
                    yield sequence

    return routes_of(sequences(), num_experts, layer_ids, where)


def _find(choice: Mapping[str, Any], answer: Answer) -> str:
    holders = [choice, choice.get("sgl_ext"), choice.get("meta_info")]
    if len(answer.choices) == 1:
        holders += [answer.body, answer.body.get("sgl_ext"), answer.body.get("meta_info")]
    for holder in holders:
        if isinstance(holder, Mapping) and holder.get(_KEY) is not None:
            value = holder[_KEY]
            if not isinstance(value, str):
                raise RecordingError(
                    f"{answer.where}: {_KEY} is {shown(value)}, expected base64 text as SGLang sends it"
                )
            return value
    raise RecordingError(
        f"{answer.where}: holds no {_KEY}; start SGLang with --enable-return-routed-experts and send "
        '"return_routed_experts": true'
    )


def _decode(text: str, where: str) -> np.ndarray:
    """int32 ids, flat."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<i4")
    except ValueError as error:
        raise RecordingError(f"{where}: {_KEY} is not base64 of int32 ids; keep the response as it came") from error
