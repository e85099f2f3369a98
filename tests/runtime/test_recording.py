"""Recording in production: which requests, what of them, and files that are bounded, whole and numbered."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiler.errors import InputError
from profiler.trace_format import RoutingTrace, TraceWriter
from profiler.trace_validation import validate_trace
from runtime.recording import Fed, RouteRecording, is_chosen
from runtime.recording_files import HEADER_BYTES, SequenceRoutes, TraceFiles
from runtime.recording_settings import RecordSettings

PROJECT = Path(__file__).resolve().parents[2]
EXPERTS, LAYERS, TOP_K = 32, 3, 2
TOKEN_BYTES = LAYERS * TOP_K + 9
FILE_TOKENS = 100
open_writer = partial(
    TraceWriter,
    model="m",
    num_experts=EXPERTS,
    layer_ids=tuple(range(LAYERS)),
    top_k=TOP_K,
    weights=False,
    token_ids=False,
)


def trace_files(folder: Path, **settings: Any) -> TraceFiles:
    chosen = {"max_bytes": HEADER_BYTES + FILE_TOKENS * TOKEN_BYTES, "max_age_s": 60.0, "most_files": 5} | settings
    return TraceFiles(folder / "routes", open_writer, token_bytes=TOKEN_BYTES, **chosen)


def routes(tokens: int, expert: int = 1) -> SequenceRoutes:
    experts = np.tile([expert, expert + 1], (tokens, LAYERS, 1))
    return SequenceRoutes(experts, np.arange(tokens), np.arange(tokens) > 0, None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def lengths(path: Path) -> list[int]:
    with RoutingTrace.open(path) as trace:
        validate_trace(trace)
        return np.bincount(trace.sequence()).tolist()


class Collected:
    """Stands for the files of a recording."""

    def __init__(self) -> None:
        self.ended: list[SequenceRoutes] = []
        self.closed = False

    def add(self, found: SequenceRoutes) -> None:
        self.ended.append(found)

    def close(self) -> None:
        self.closed = True


def recording(rate: float = 1.0, **settings: Any) -> tuple[RouteRecording, Collected]:
    files: Any = Collected()
    return RouteRecording(files, EXPERTS, rate, settings.pop("seed", 0), settings.pop("token_ids", True)), files


def layers_of(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32) for _ in range(LAYERS)]


def keep(kept: RouteRecording, fed: list[Fed], experts: list[torch.Tensor]) -> None:
    """Experts that come by falling weight."""
    kept.keep(fed, experts, [torch.arange(TOP_K, 0, -1.0).expand(layer.shape) for layer in experts])


@given(rate=st.floats(0.01, 1), seed=st.integers(0, 2**40))
def test_the_chosen_share_of_requests(rate: float, seed: int) -> None:
    chosen = [is_chosen(number, rate, seed) for number in range(2000)]
    assert abs(np.mean(chosen) - rate) < 5 * (rate * (1 - rate) / 2000) ** 0.5 + 1e-9
    assert chosen == [is_chosen(number, rate, seed) for number in range(2000)]


def test_seeds_choose_differently() -> None:
    first, second = ([is_chosen(number, 0.5, seed) for number in range(200)] for seed in (0, 1))
    assert 60 < sum(a == b for a, b in zip(first, second, strict=True)) < 140


def test_a_request_is_kept_whole_or_not_at_all() -> None:
    kept, files = recording(rate=0.5)
    prompt, step = layers_of(80), layers_of(48, seed=1)
    keep(kept, [Fed(number, 0, 2) for number in range(40)], prompt)
    keep(kept, [Fed(number, None, 1) for number in range(40)], step)  # and 8 rows of padding
    for number in range(40):
        kept.end(number, [number, 50 + number, 7, 8], 2)
    chosen = [number for number in range(40) if is_chosen(number, 0.5, 0)]
    assert 0 < len(chosen) < 40
    assert [found.token_ids.tolist() for found in files.ended if found.token_ids is not None] == [
        [number, 50 + number, 7] for number in chosen
    ]
    for number, found in zip(chosen, files.ended, strict=True):
        expected = [
            [*a[2 * number : 2 * number + 2].tolist(), b[number].tolist()] for a, b in zip(prompt, step, strict=True)
        ]
        np.testing.assert_array_equal(found.experts.swapaxes(0, 1), expected)
        assert found.decode.tolist() == [False, False, True]
        assert found.position.tolist() == [0, 1, 2]
        assert found.experts.dtype == np.uint8


def test_experts_are_sorted_by_falling_weight_and_equal_ones_stay() -> None:
    kept, files = recording()
    experts = [torch.tensor([[3, 9], [4, 5], [6, 1]])] * LAYERS
    weights = [torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])] * LAYERS
    kept.keep([Fed(0, 0, 3)], experts, weights)
    kept.end(0, [1, 2, 3], 0)
    kept.close()
    assert files.ended[0].experts[:, 0].tolist() == [[9, 3], [4, 5], [6, 1]]
    assert files.closed


def test_tokens_that_are_fed_again_or_were_cached() -> None:
    kept, files = recording()
    again = layers_of(6, seed=2)
    keep(kept, [Fed(0, 4, 3)], layers_of(3))  # the first four came from a cache
    keep(kept, [Fed(0, None, 1)], layers_of(1, seed=1))
    keep(kept, [Fed(0, 4, 6)], again)  # preempted, and fed again
    keep(kept, [Fed(0, 4, 2)], layers_of(2))
    kept.end(0, [0, 0, 0, 0, 1, 2, 3, 9, 8, 7, 6], 4)
    [found] = files.ended
    assert found.token_ids is not None
    assert (found.position.tolist(), found.token_ids.tolist()) == ([4, 5, 6, 7, 8, 9], [1, 2, 3, 9, 8, 7])
    np.testing.assert_array_equal(found.experts[4:, 0], again[0][4:])


def test_requests_that_end_early() -> None:
    kept, files = recording()
    keep(kept, [Fed(0, 0, 2), Fed(1, 0, 1)], layers_of(3))
    kept.end(0, [1, 2, 3], 0)  # cancelled within its prompt
    kept.end(5, [4], 0)  # never fed
    keep(kept, [Fed(1, None, 1)], layers_of(1))
    keep(kept, [Fed(1, None, 1)], layers_of(1))
    kept.end(1, [6, 7, 8], 2)  # its last step was for nothing: the token before had ended it
    assert [found.position.tolist() for found in files.ended] == [[0, 1], [0, 1]]


def test_routes_that_are_under_way_when_their_request_ends() -> None:
    """On a GPU a step is launched before the tokens of the one before are known."""
    kept, files = recording()
    before, ahead = layers_of(2), layers_of(2, seed=1)
    keep(kept, [Fed(0, 0, 1), Fed(1, 0, 1)], before)
    keep(kept, [Fed(0, None, 1), Fed(1, None, 1)], ahead)
    arrived = kept._passes
    assert not arrived, "on a CPU routes are there at once"
    late = SimpleNamespace(query=lambda: late.done, done=False)
    last = layers_of(2, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.recording._copy_to_host", lambda tensor: (tensor, late))
        keep(kept, [Fed(0, None, 1), Fed(1, None, 1)], last)
    kept.end(0, [5, 6, 7], 2)
    assert len(kept._passes) == 1
    late.done = True
    kept.end(1, [5, 6, 7, 8], 3)
    assert [found.position.tolist() for found in files.ended] == [[0, 1], [0, 1, 2]]
    expected = [[layers[index][1].tolist() for index in range(LAYERS)] for layers in (before, ahead, last)]
    np.testing.assert_array_equal(files.ended[1].experts, expected)


def test_files_are_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    files = trace_files(tmp_path, most_files=3)
    sizes = [60, 40, 1, 99, 100, 30, 80, 20]
    for expert, tokens in enumerate(sizes):
        files.add(routes(tokens, expert))
    files.close()
    assert names(tmp_path) == [f"routes-000{number}.safetensors" for number in (3, 4, 5)]
    found = [lengths(tmp_path / name) for name in names(tmp_path)]
    assert found == [[100], [30], [80, 20]]
    assert all((tmp_path / name).stat().st_size <= HEADER_BYTES + FILE_TOKENS * TOKEN_BYTES for name in names(tmp_path))
    with RoutingTrace.open(tmp_path / "routes-0004.safetensors") as trace:
        assert (trace.experts()[..., 0] == 5).all()


def test_a_file_is_finished_by_time(tmp_path: Path) -> None:
    files = trace_files(tmp_path, max_age_s=0.05)
    files.add(routes(3))
    deadline = time.monotonic() + 20
    while not names(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    files.add(routes(4))
    files.close()
    assert [lengths(tmp_path / name) for name in names(tmp_path)] == [[3], [4]]


def test_numbers_go_on_and_nothing_is_written_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "routes-0041.safetensors").write_bytes(b"of an earlier run")
    (tmp_path / "routes-b-0099.safetensors").write_bytes(b"of others")
    trace_files(tmp_path).close()
    assert len(names(tmp_path)) == 2
    files = trace_files(tmp_path)
    files.add(routes(2))
    files.close()
    assert "routes-0042.safetensors" in names(tmp_path)


def test_two_servers_do_not_share_files(tmp_path: Path) -> None:
    files = trace_files(tmp_path)
    with pytest.raises(InputError, match="another server records there"):
        trace_files(tmp_path)
    files.close()
    trace_files(tmp_path).close()


def test_a_full_disk_ends_the_recording_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(path: Path) -> TraceWriter:
        raise OSError(28, "No space left on device")

    files = TraceFiles(tmp_path / "routes", fail, token_bytes=1, max_bytes=1 << 20, max_age_s=60, most_files=1)
    for _ in range(3):
        files.add(routes(2))
    files.close()
    assert caplog.text.count("recording ends") == 1
    assert not names(tmp_path)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.runtime.test_recording import routes, trace_files
files = trace_files(Path(sys.argv[1]))
for number in range(7):
    files.add(routes(40))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_crash_loses_the_file_under_way_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(PROJECT)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 20
        while len(names(tmp_path)) < 3 or not list(tmp_path.glob(".*-0004*.parts")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [lengths(tmp_path / name) for name in names(tmp_path)] == [[40, 40]] * 3
    files = trace_files(tmp_path)  # the lock went with its holder, the unfinished file goes now
    assert not list(tmp_path.glob(".*.parts"))
    files.add(routes(5))
    files.close()
    assert lengths(tmp_path / "routes-0004.safetensors") == [5]


@pytest.mark.parametrize(("settings", "message"), [
    ({"record_rate": 0}, "record_rate=0: expected a number above 0 and at most 1"),
    ({"record_rate": 1.5}, "record_rate=1.5"),
    ({"record_rate": True}, "record_rate=True"),
    ({"record_max_mb": -1}, "record_max_mb=-1"),
    ({"record_max_mb": float("nan")}, "record_max_mb=nan"),
    ({"record_minutes": "soon"}, "record_minutes=soon"),
    ({"record_rotate": 0}, "record_rotate=0: expected an integer of at least 1"),
    ({"record_seed": 1.0}, "record_seed=1.0"),
    ({"record_token_ids": 1}, "record_token_ids=1: expected true or false"),
    ({"record": 7}, "record=7: expected a path"),
])  # fmt: skip
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RecordSettings(**settings)
