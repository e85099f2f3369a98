"""Routing traces: what is written is read back, lazily, and writing holds little in memory."""

from __future__ import annotations

import resource
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.errors import TraceError
from profiler.trace_format import RoutingCounts, RoutingTrace, TraceWriter
from profiler.trace_header import encode_header
from tests.support.traces import random_sequences, write_trace


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    num_layers=st.integers(1, 4),
    shape=st.sampled_from([(1, 1), (8, 2), (8, 8), (256, 3), (257, 3), (300, 1)]),
    weights=st.booleans(),
    token_ids=st.booleans(),
    gate_ahead=st.booleans(),
    named=st.booleans(),
    tokens_per_chunk=st.integers(1, 20),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(
    lengths: list[int],
    num_layers: int,
    shape: tuple[int, int],
    weights: bool,
    token_ids: bool,
    gate_ahead: bool,
    named: bool,
    tokens_per_chunk: int,
    seed: int,
) -> None:
    num_experts, top_k = shape
    sequences = random_sequences(lengths, num_layers=num_layers, num_experts=num_experts, top_k=top_k, seed=seed)
    layer_ids = [2 * layer + 1 for layer in range(num_layers)]
    domains = [f"domain é {index % 2}" for index in range(len(lengths))] if named else None
    with tempfile.TemporaryDirectory() as folder:
        path = write_trace(
            Path(folder) / "trace.safetensors",
            sequences,
            num_experts=num_experts,
            layer_ids=layer_ids,
            weights=weights,
            token_ids=token_ids,
            gate_ahead=gate_ahead,
            domains=domains,
        )
        assert [entry.name for entry in Path(folder).iterdir()] == [path.name]
        with RoutingTrace.open(path) as trace:
            assert (trace.num_tokens, trace.num_layers, trace.top_k) == (sum(lengths), num_layers, top_k)
            assert (trace.num_experts, trace.layer_ids, trace.model) == (num_experts, tuple(layer_ids), "tiny")
            assert trace.domains == (None if domains is None else tuple(domains))
            assert trace.num_sequences == sum(length > 0 for length in lengths)
            assert (trace.has_weights, trace.has_token_ids, trace.has_gate_ahead) == (weights, token_ids, gate_ahead)
            assert trace.experts().dtype == (np.uint8 if num_experts <= 256 else np.uint16)
            np.testing.assert_array_equal(trace.experts(), np.concatenate([s.experts for s in sequences]))
            np.testing.assert_array_equal(trace.sequence(), np.repeat(np.arange(len(lengths)), lengths))
            np.testing.assert_array_equal(trace.position(), np.concatenate([np.arange(n) for n in lengths]))
            np.testing.assert_array_equal(trace.decode(), np.concatenate([s.decode for s in sequences]))
            if weights:
                np.testing.assert_array_equal(trace.weights(), np.concatenate([s.weights for s in sequences]))
            if token_ids:
                np.testing.assert_array_equal(trace.token_ids(), np.concatenate([s.token_ids for s in sequences]))
            chunks = list(trace.chunks(tokens_per_chunk))
            if gate_ahead:
                ahead = np.concatenate([s.gate_ahead for s in sequences])
                assert trace.gate_ahead().dtype == trace.experts().dtype
                np.testing.assert_array_equal(trace.gate_ahead(), ahead)
                np.testing.assert_array_equal(trace.gate_ahead(1, 3), ahead[1:3])
                np.testing.assert_array_equal(np.concatenate([chunk.gate_ahead for chunk in chunks]), ahead)
            else:
                assert all(chunk.gate_ahead is None for chunk in chunks)
            assert [chunk.start for chunk in chunks] == list(range(0, sum(lengths), tokens_per_chunk))
            np.testing.assert_array_equal(np.concatenate([chunk.experts for chunk in chunks]), trace.experts())
            np.testing.assert_array_equal(np.concatenate([chunk.sequence for chunk in chunks]), trace.sequence())
            np.testing.assert_array_equal(trace.experts(1, 3), trace.experts()[1:3])
        stored = safetensors.numpy.load_file(path)  # the reference reader takes the file as well
        np.testing.assert_array_equal(stored["experts"], np.concatenate([s.experts for s in sequences]))


def test_optional_metadata(tmp_path: Path) -> None:
    settings = {"model": "m", "num_experts": 4, "layer_ids": [0], "top_k": 1, "weights": False, "token_ids": False}
    routes = {"experts": np.zeros((2, 1, 1), int), "decode": np.zeros(2, bool)}
    for path, extra in ((tmp_path / "a", {}), (tmp_path / "b", {"model_fingerprint": "f" * 64, "expert_bytes": 77})):
        with TraceWriter(path, **settings, **extra) as writer:
            assert writer.add_sequence(**routes) == 0
            assert writer.add_sequence(**routes, position=np.array([4, 9]), domain="code") == 1
    with RoutingTrace.open(tmp_path / "a") as trace:
        assert (trace.model_fingerprint, trace.expert_bytes) == (None, None)
        assert trace.position().tolist() == [0, 1, 4, 9]
        assert trace.domains == ("", "code")
        with pytest.raises(TraceError, match="no router weights"):
            trace.weights()
        with pytest.raises(TraceError, match="no token ids"):
            trace.token_ids()
        with pytest.raises(TraceError, match="record it again with gate_ahead=true"):
            trace.gate_ahead()
    with RoutingTrace.open(tmp_path / "b") as trace:
        assert (trace.model_fingerprint, trace.expert_bytes) == ("f" * 64, 77)


def test_split_by_parity_of_the_sequence(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.safetensors", random_sequences([2, 3, 1]))
    with RoutingTrace.open(path) as trace:
        assert trace.split_mask("even").tolist() == [True, True, False, False, False, True]
        assert trace.split_mask("odd").tolist() == [False, False, True, True, True, False]
        assert trace.split_mask("all").all()
        with pytest.raises(TraceError, match="expected even, odd or all"):
            trace.split_mask("third")  # type: ignore[arg-type]
    single = RoutingTrace.open(write_trace(path, random_sequences([2])))
    with pytest.raises(TraceError, match="no tokens in odd sequences"):
        single.split_mask("odd")


def test_hash_depends_on_the_content_alone(tmp_path: Path) -> None:
    paths = [write_trace(tmp_path / str(seed), random_sequences([4], seed=seed)) for seed in (0, 1)]
    again = write_trace(tmp_path / "again", random_sequences([4], seed=0))
    first, second, third = (RoutingTrace.open(path).sha256() for path in (*paths, again))
    assert first == third != second
    assert len(first) == 64


def test_arrays_are_read_only_and_outlive_the_trace(tmp_path: Path) -> None:
    sequences = random_sequences([5])
    with RoutingTrace.open(write_trace(tmp_path / "t", sequences)) as trace:
        experts = trace.experts()
    np.testing.assert_array_equal(experts, sequences[0].experts)
    with pytest.raises(ValueError, match="read-only"):
        experts[0, 0, 0] = 1
    with pytest.raises(ValueError, match="closed"):
        trace.experts()


def test_opening_a_huge_trace_reads_its_header_alone(tmp_path: Path) -> None:
    tokens, layers, top_k = 100_000_000, 64, 8
    metadata = {"format": "routing-trace", "version": "1", "model": "m", "num_experts": "64"}
    metadata["layer_ids"] = str(list(range(layers)))
    columns = [("sequence", "<i4"), ("position", "<i4"), ("experts", "u1"), ("decode", "u1")]
    tensors = [
        (name, np.dtype(dtype), (tokens, layers, top_k) if name == "experts" else (tokens,)) for name, dtype in columns
    ]
    header = encode_header(tensors, metadata)
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + tokens * (4 + 4 + 1 + layers * top_k))  # sparse: 52 GB that take no disk
    before = resident_bytes()
    with RoutingTrace.open(path, validate=False) as trace:
        assert trace.experts(tokens - 3).shape == (3, layers, top_k)
        assert trace.num_tokens == tokens
    assert resident_bytes() - before < 20e6
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(TraceError, match="truncated: tensor decode ends"):
        RoutingTrace.open(path, validate=False)


def test_writer_and_validation_hold_little_in_memory(tmp_path: Path) -> None:
    """200,000 tokens of 48 layers, top-8: 77 MB of ids and 154 MB of weights."""
    generator = np.random.default_rng(0)
    experts = np.argsort(generator.random((1000, 48, 64)), axis=-1)[..., :8].astype(np.uint8)
    weights = -np.sort(-generator.random((1000, 48, 8)), axis=-1).astype(np.float16)
    decode = np.zeros(1000, bool)
    tracemalloc.start()
    with TraceWriter(
        tmp_path / "t", model="m", num_experts=64, layer_ids=range(48), top_k=8, weights=True, token_ids=False
    ) as writer:
        for _ in range(200):
            writer.add_sequence(experts, decode=decode, weights=weights)
    written_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    with RoutingTrace.open(tmp_path / "t") as trace:
        assert trace.num_tokens == 200_000
    read_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written_peak < 8e6
    assert read_peak < 60e6


BARE: dict[str, Any] = {
    "model": "m",
    "num_experts": 8,
    "layer_ids": [0, 1, 2],
    "top_k": 2,
    "weights": False,
    "token_ids": False,
}


def test_nothing_is_left_behind_when_recording_fails(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.safetensors", random_sequences([3], seed=1))
    before = path.read_bytes()
    sequence = random_sequences([3])[0]

    def interrupted() -> None:
        with TraceWriter(path, **BARE) as writer:
            writer.add_sequence(sequence.experts, decode=sequence.decode)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(TraceError, match="no token was recorded"), TraceWriter(path, **BARE):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    sequence = random_sequences([20_000])[0]

    def record() -> None:
        with TraceWriter(tmp_path / "t", **BARE) as writer:
            writer.add_sequence(sequence.experts, decode=sequence.decode)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for allowed in (50_000, 150_000):  # of 120,000 bytes of routes, 300,000 in all: too little for a part, or the whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
        try:
            with pytest.raises(TraceError, match=r"cannot be written \(File too large\); free space"):
                record()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    record()
    assert RoutingTrace.open(tmp_path / "t").num_tokens == 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.full((3, 3, 2), 8)}, r"expert ids 8 to 8 in sequence 0, expected 0 to 7"),
        ({"experts": np.full((3, 3, 2), -1)}, r"expert ids -1 to -1"),
        ({"experts": np.zeros((3, 2, 2), int)}, r"experts of sequence 0 is \(3, 2, 2\), expected \(3, 3, 2\)"),
        ({"decode": np.zeros(2, bool)}, r"decode of sequence 0 is \(2,\), expected \(3,\)"),
        ({"weights": None}, r"sequence 0 comes with decode, experts, gate_ahead, position, sequence, not .*weights"),
        ({"token_ids": np.zeros(3, int)}, r"comes with .*token_ids"),
        ({"gate_ahead": None}, r"comes with decode, experts, position, sequence, weights, not .*gate_ahead"),
        ({"gate_ahead": np.zeros((3, 3, 2), int)}, r"gate_ahead of sequence 0 is \(3, 3, 2\), expected \(3, 2, 2\)"),
        ({"gate_ahead": np.full((3, 2, 2), 9)}, r"expert ids of gate_ahead 9 to 9 in sequence 0, expected 0 to 7"),
    ],
)
def test_writer_refuses_what_does_not_fit(tmp_path: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    sequence = random_sequences([3])[0]
    wanted = {"weights": True, "token_ids": False, "gate_ahead": True}
    given = {name: getattr(sequence, name) for name in ("experts", "decode", "weights", "gate_ahead")} | change
    with (
        pytest.raises(TraceError, match=message),
        TraceWriter(tmp_path / "t", model="m", num_experts=8, layer_ids=range(3), top_k=2, **wanted) as writer,
    ):
        writer.add_sequence(**given)
    assert not list(tmp_path.iterdir())


def test_writer_refuses_outputs_and_shapes_that_cannot_be(tmp_path: Path) -> None:
    settings = {"model": "m", "layer_ids": [0], "weights": False, "token_ids": False}
    with pytest.raises(TraceError, match="create it first"):
        TraceWriter(tmp_path / "missing" / "t", num_experts=4, top_k=2, **settings)
    with pytest.raises(TraceError, match="is a folder"):
        TraceWriter(tmp_path, num_experts=4, top_k=2, **settings)
    with pytest.raises(TraceError, match="top_k 5 of 4 experts"):
        TraceWriter(tmp_path / "t", num_experts=4, top_k=5, **settings)
    assert not list(tmp_path.iterdir())


def test_counts_round_trip(tmp_path: Path) -> None:
    counts = np.arange(12).reshape(3, 4)
    RoutingCounts(counts, "m", (0, 2, 5), source="an engine").save(tmp_path / "c")
    read = RoutingCounts.open(tmp_path / "c")
    np.testing.assert_array_equal(read.counts, counts)
    assert (read.model, read.layer_ids, read.source, read.num_experts) == ("m", (0, 2, 5), "an engine", 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    with pytest.raises(TraceError, match="its format is 'routing-counts', expected 'routing-trace'"):
        RoutingTrace.open(tmp_path / "c")


def test_counts_are_validated(tmp_path: Path) -> None:
    RoutingCounts(np.array([[1, -2]]), "m", (0,)).save(tmp_path / "c")
    with pytest.raises(TraceError, match="holds the count -2"):
        RoutingCounts.open(tmp_path / "c")
    RoutingCounts(np.array([[1, 2]]), "m", (0, 1)).save(tmp_path / "c")
    with pytest.raises(TraceError, match=r"counts is I64 \[1, 2\], expected I64 \[2, 2\]"):
        RoutingCounts.open(tmp_path / "c")
