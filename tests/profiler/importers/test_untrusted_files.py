"""Files from elsewhere: no code of theirs runs, and damage is told in one line whatever byte it hits."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from profiler.errors import InputError
from profiler.importers import IMPORTERS, ModelFacts, RecordedRoutes, Remarks
from tests.support.engine_recordings import (
    EXTEND,
    npy_text,
    random_routes,
    sglang_text,
    slot_map,
    token_record,
    write_lines,
    write_passes,
    write_stat,
    write_statistics,
    write_tokens,
)

FACTS = ModelFacts("m", 8, 2, (0, 1))


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.witness,))


def read_all(engine: str, path: Path, facts: ModelFacts = FACTS) -> None:
    recording = IMPORTERS[engine]([path], facts, Remarks())
    if isinstance(recording, RecordedRoutes):
        list(recording.sequences)


def pickled(payload: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=2))


def saved_by_torch(payload: Any, path: Path) -> None:
    torch.save({"logical_count": torch.ones(1, 2, 8, dtype=torch.int32), "rank": payload}, path)


def saved_by_numpy(payload: Any, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([[payload]], object), allow_pickle=True)


def in_a_response(payload: Any, path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[[payload]]], object), allow_pickle=True)
    write_lines(path, [{"choices": [{"routed_experts": base64.b64encode(buffer.getvalue()).decode()}]}])


@pytest.mark.parametrize(
    ("engine", "name", "write"),
    [
        ("sglang", "a.pt", pickled),
        ("sglang", "a.pt", saved_by_torch),
        ("exflow", "a.npy", saved_by_numpy),
        ("exflow", "a.npy", pickled),
        ("vllm", "a.jsonl", in_a_response),
    ],
)
def test_code_in_a_file_is_refused_and_does_not_run(
    tmp_path: Path, engine: str, name: str, write: Callable[[Any, Path], None]
) -> None:
    witness = tmp_path / "ran"
    write(Payload(witness), tmp_path / name)
    with pytest.raises(InputError) as refused:
        read_all(engine, tmp_path / name, ModelFacts("m", 8, None, (0, 1)))
    assert not witness.exists()
    assert "\n" not in str(refused.value)


def samples(folder: Path) -> dict[tuple[str, str], Path]:
    """A sound file of every kind, by engine and the file to damage."""
    routes = random_routes(5, 2, 8, 2)
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    text = {"choices": [{"routed_experts": npy_text(routes)}], "usage": usage}
    record = {"record_type": "eplb_load_stats", "version": 1}
    record |= {"expert_load": [[1] * 8] * 2, "p2l_map": [list(range(8))] * 2}
    np.save(folder / "e.npy", routes[:, :, 0])
    counts = {f"{step}_{layer}": np.ones(8) for step in range(2) for layer in range(2)}
    directory = write_statistics(folder / "t", [counts], 8, 2)
    return {
        ("sglang", "s.pt"): write_stat(folder / "s.pt", np.ones((2, 2, 8), int)),
        ("sglang", "p.pt"): write_passes(folder / "p.pt", np.ones((2, 2, 8), int), slot_map(2, 8, 0)),
        ("sglang", "k.pt"): write_tokens(
            folder / "k.pt",
            [token_record(0, EXTEND, range(5), range(5), routes, (0, 1), (2, 8), [5])],
            slot_map(2, 8, 0),
        ),
        ("sglang", "h.jsonl"): write_lines(
            folder / "h.jsonl", [{"meta_info": usage | {"routed_experts": sglang_text(routes)}}]
        ),
        ("vllm", "v.jsonl"): write_lines(folder / "v.jsonl", [text]),
        ("vllm", "b.jsonl"): write_lines(folder / "b.jsonl", [record]),
        ("exflow", "e.npy"): folder / "e.npy",
        ("trtllm", "t/rank0.safetensors"): directory,
        ("trtllm", "t/meta_info.json"): directory,
    }


KINDS = ["s.pt", "p.pt", "k.pt", "h.jsonl", "v.jsonl", "b.jsonl", "e.npy", "t/rank0.safetensors", "t/meta_info.json"]


@pytest.mark.parametrize("name", KINDS)
@given(place=st.floats(0, 1, exclude_max=True), length=st.integers(0, 12), change=st.binary(max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: float, length: int, change: bytes
) -> None:
    """A run of bytes is replaced by others; what is read then is either sound or refused."""
    folder = tmp_path_factory.mktemp("damage")
    (engine, _), path = next(item for item in samples(folder).items() if item[0][1] == name)
    facts = ModelFacts("m", 8, 1 if engine == "exflow" else 2, (0, 1))
    read_all(engine, path, facts)
    content = (folder / name).read_bytes()
    start = int(place * len(content))
    (folder / name).write_bytes(content[:start] + change + content[start + length :])
    with suppress(InputError):
        read_all(engine, path, facts)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_short_or_missing_is_refused(tmp_path: Path, name: str) -> None:
    (engine, _), path = next(item for item in samples(tmp_path).items() if item[0][1] == name)
    facts = ModelFacts("m", 8, 1 if engine == "exflow" else 2, (0, 1))
    content = (tmp_path / name).read_bytes()
    for size in (0, len(content) // 3, len(content) - 3):
        (tmp_path / name).write_bytes(content[:size])
        with pytest.raises(InputError):
            read_all(engine, path, facts)
    (tmp_path / name).unlink()
    with pytest.raises(InputError):
        read_all(engine, path, facts)
