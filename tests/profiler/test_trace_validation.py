"""Every way in which a trace can be wrong is told in one line that names value, expectation and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from profiler.errors import TraceError
from profiler.trace_format import RoutingTrace

LAYERS, EXPERTS, TOP_K = (1, 3), 32, 2


def valid_parts() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Three sequences of 4, 1 and 3 tokens; two layers, top-2 of 32."""
    tokens = 8
    tensors = {
        "experts": np.tile(np.array([[5, 2], [31, 0]], np.uint8), (tokens, 1, 1)),
        "weights": np.tile(np.array([[0.75, 0.25], [0.5, 0.5]], np.float16), (tokens, 1, 1)),
        "sequence": np.array([0, 0, 0, 0, 1, 2, 2, 2], np.int32),
        "position": np.array([0, 1, 2, 3, 0, 0, 1, 5], np.int32),
        "decode": np.array([0, 0, 1, 1, 0, 0, 0, 1], np.uint8),
        "token_ids": np.arange(tokens, dtype=np.int32),
        "gate_ahead": np.tile(np.array([[7, 31]], np.uint8), (tokens, 1, 1)),
    }
    metadata = {
        "format": "routing-trace",
        "version": "1",
        "model": "m",
        "num_experts": str(EXPERTS),
        "layer_ids": json.dumps(LAYERS),
        "domains": json.dumps(["a", "b", "a"]),
    }
    return tensors, metadata


def put(name: str, index: Any, value: float) -> dict[str, np.ndarray]:
    array = valid_parts()[0][name].copy()
    array[index] = value
    return {name: array}


def refusal(tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, Any]) -> str:
    """The message with which a changed trace is refused; None removes a tensor or a key."""
    valid_tensors, valid_metadata = valid_parts()
    path = tmp_path / "trace.safetensors"
    kept = {name: array for name, array in (valid_tensors | tensors).items() if array is not None}
    save_file(kept, path, {name: text for name, text in (valid_metadata | metadata).items() if text is not None})
    with pytest.raises(TraceError) as caught:
        RoutingTrace.open(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_the_unchanged_trace_is_accepted(tmp_path: Path) -> None:
    tensors, metadata = valid_parts()
    save_file(tensors, tmp_path / "t", metadata)
    with RoutingTrace.open(tmp_path / "t") as trace:
        assert (trace.num_tokens, trace.num_sequences, trace.layer_ids) == (8, 3, LAYERS)


VALUE_ERRORS = {
    "id": (put("experts", (6, 1, 0), 40), "expert id 40 in layer 3 at token 6, expected < 32; record it again"),
    "duplicate": (put("experts", (2, 0, 1), 5), "expert id 5 stands twice in layer 1 at token 2"),
    "id ahead": (put("gate_ahead", (6, 0, 1), 32), "expert id 32 of gate_ahead in layer 3 at token 6, expected < 32"),
    "duplicate ahead": (
        put("gate_ahead", (1, 0, 0), 31),
        "expert id 31 of gate_ahead stands twice in layer 3",
    ),
    "rising": (put("weights", (3, 0, 1), 0.9), "in layer 1 at token 3, expected finite numbers, falling"),
    "nan": (put("weights", (3, 1, 1), np.nan), "weights [0.5, nan] in layer 3 at token 3, expected finite"),
    "infinite": (put("weights", (3, 0, 0), np.inf), "weights [inf, 0.25] in layer 1 at token 3"),
    "decode": (put("decode", 4, 2), "decode is 2 at token 4, expected 0 or 1"),
    "order": (put("position", 2, 1), "position 1 at token 2 follows 1 in sequence 0, expected rising positions"),
    "negative position": (put("position", 0, -1), "position -1 at token 0, expected >= 0"),
    "negative sequence": (put("sequence", 4, -3), "sequence -3, position 0 at token 4"),
    "torn apart": (put("sequence", 7, 0), "sequence 0 starts again at token 7, expected its tokens together"),
    "domains": (put("sequence", 4, 3), "sequence 3 has no domain, expected at least 4 names in domains"),
}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_wrong_values(tmp_path: Path, name: str) -> None:
    tensors, message = VALUE_ERRORS[name]
    assert message in refusal(tmp_path, tensors, {})


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_values_are_not_read_without_validation(tmp_path: Path, name: str) -> None:
    tensors, metadata = valid_parts()
    save_file(tensors | VALUE_ERRORS[name][0], tmp_path / "t", metadata)
    assert RoutingTrace.open(tmp_path / "t", validate=False).num_tokens == 8


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "placement-plan"}, "its format is 'placement-plan', expected 'routing-trace'"),
        ({"format": None}, "its format is None, expected 'routing-trace'"),
        ({"version": "2"}, "version '2' of routing-trace is not supported, expected '1'"),
        ({"version": None}, "version None"),
        ({"model": None}, "metadata model is missing"),
        ({"num_experts": None}, "metadata num_experts is None, expected a positive whole number"),
        ({"num_experts": "-4"}, "metadata num_experts is '-4'"),
        ({"num_experts": "0"}, "metadata num_experts is '0'"),
        ({"num_experts": "9" * 5000}, "metadata num_experts is"),
        ({"num_experts": "100000000"}, "num_experts is 100000000, expected at most 65536"),
        ({"layer_ids": "[" * 100000}, "metadata layer_ids is missing or not JSON"),
        ({"num_experts": "1"}, "1 to 1 choices"),
        ({"layer_ids": None}, "metadata layer_ids is missing or not JSON"),
        ({"layer_ids": "1, 3"}, "metadata layer_ids is missing or not JSON"),
        ({"layer_ids": '["1"]'}, "metadata layer_ids must be a JSON list of int"),
        ({"layer_ids": "[true, 3]"}, "metadata layer_ids must be a JSON list of int"),
        ({"layer_ids": "[3, 1]"}, "must be decoder layers in rising order"),
        ({"layer_ids": "[1, 1]"}, "must be decoder layers in rising order"),
        ({"layer_ids": "[]"}, "must be decoder layers in rising order"),
        ({"layer_ids": "[1, 2, 3]"}, "experts has shape [8, 2, 2], expected [tokens >= 1, 3 layers"),
        ({"domains": '{"a": 1}'}, "metadata domains must be a JSON list of str"),
        ({"expert_bytes": "many"}, "metadata expert_bytes is 'many'"),
    ],
)
def test_wrong_metadata(tmp_path: Path, metadata: dict[str, str | None], message: str) -> None:
    assert message in refusal(tmp_path, {}, metadata)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"experts": None}, "tensors experts are missing"),
        ({"decode": None, "position": None}, "tensors position, decode are missing"),
        ({"experts": np.zeros((8, 2), np.uint8)}, "experts has shape [8, 2], expected [tokens >= 1, 2 layers"),
        ({"experts": np.zeros((0, 2, 2), np.uint8)}, "experts has shape [0, 2, 2], expected [tokens >= 1"),
        ({"experts": np.zeros((8, 2, 2), np.int64)}, "experts is I64 [8, 2, 2], expected U8 or U16 [8, 2, 2]"),
        ({"weights": np.zeros((8, 2, 1), np.float16)}, "weights is F16 [8, 2, 1], expected F16 [8, 2, 2]"),
        ({"weights": np.zeros((8, 2, 2), np.float32)}, "weights is F32 [8, 2, 2], expected F16 [8, 2, 2]"),
        ({"sequence": np.zeros(7, np.int32)}, "sequence is I32 [7], expected I32 [8]"),
        ({"token_ids": np.zeros(8, np.int64)}, "token_ids is I64 [8], expected I32 [8]"),
        ({"decode": np.zeros(8, np.uint16)}, "decode is U16 [8], expected U8 [8]"),
        ({"gate_ahead": np.zeros((8, 2, 2), np.uint8)}, "gate_ahead is U8 [8, 2, 2], expected U8 or U16 [8, 1, 2]"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, np.ndarray | None], message: str) -> None:
    assert message in refusal(tmp_path, tensors, {})


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    tensors, metadata = valid_parts()
    save_file(tensors, tmp_path / "whole", metadata)
    whole = (tmp_path / "whole").read_bytes()
    header_bytes = int.from_bytes(whole[:8], "little")
    cases = {
        "empty": (b"", "not a safetensors file"),
        "text": (b"hello, this is not a trace", "not a safetensors file"),
        "cut in the header": (whole[: header_bytes // 2], "cut within its header"),
        "cut in the data": (whole[:-1], "truncated: tensor"),
        "bad JSON": (whole[:8] + b"!" + whole[9:], "header is malformed"),
        "JSON, but a list": (len(b"[1, 2]").to_bytes(8, "little") + b"[1, 2]", "header is malformed"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TraceError, match=message):
            RoutingTrace.open(tmp_path / name)
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.open(tmp_path / "missing")
    with pytest.raises(TraceError, match="cannot be read"):
        RoutingTrace.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        b'{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}',
        b'{"dtype":"U8","shape":["x"],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[1e999],"data_offsets":[0,1]}',
        b'{"dtype":"U8","shape":[1],"data_offsets":[1,0]}',
        b"[" * 100000,
    ],
)
def test_malformed_entries(tmp_path: Path, entry: bytes) -> None:
    header = b'{"experts":' + entry + b"}"
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(TraceError, match=r"is malformed|does not fit its shape"):
        RoutingTrace.open(tmp_path / "t")


def test_tensors_that_the_format_does_not_know_are_ignored(tmp_path: Path) -> None:
    tensors, metadata = valid_parts()
    save_file(tensors | {"later": np.zeros(3, np.float64)}, tmp_path / "t", metadata)
    with RoutingTrace.open(tmp_path / "t") as trace:
        assert trace.num_tokens == 8


def test_byte_ranges_that_do_not_fit_the_shape(tmp_path: Path) -> None:
    tensors, metadata = valid_parts()
    save_file(tensors, tmp_path / "t", metadata)
    whole = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(whole.replace(b'"shape":[8,2,2]', b'"shape":[8,2,1]'))
    with pytest.raises(TraceError, match="byte range that does not fit its shape"):
        RoutingTrace.open(tmp_path / "t")
