"""What ranks say to each other: step plans, long messages, texts; and the settings of a run."""

from __future__ import annotations

import json
import multiprocessing
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from runtime.distributed import MESSAGE_BYTES, TEXT_BYTES, RankAddress, RankGroup, choose_device
from runtime.errors import ModelError
from runtime.launcher import LocalRanks
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.start import start_run
from runtime.step_plan import Admission, Piece, StepPlan

HEADER = 8


@given(
    retire=st.lists(st.integers(0, 9)),
    admit=st.lists(
        st.builds(
            Admission,
            sequence=st.integers(0),
            tokens=st.lists(st.integers(0, 2**31), min_size=1, max_size=9),
            home=st.integers(0, 7),
            sampling=st.builds(
                SamplingParameters,
                temperature=st.floats(0, 2),
                top_p=st.floats(0, 1, exclude_min=True),
                seed=st.integers(-(2**63), 2**63 - 1),
            ),
            pages=st.lists(st.integers(0, 99)),
            cached=st.integers(0, 99),
        ),
        max_size=3,
    ),
    grow=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99))),
    feed=st.lists(st.builds(Piece, st.integers(0, 9), st.integers(0, 99), st.integers(0, 99))),
    decode=st.booleans(),
    stop=st.booleans(),
)
def test_step_plans_survive_json(**parts: Any) -> None:
    plan = StepPlan(**parts)
    assert StepPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def _messages() -> list[Any]:
    """Long and short in turn; some whose JSON just fits into the first broadcast, or just not."""
    exact = MESSAGE_BYTES - HEADER - 2  # and two quotation marks
    return [
        {},
        "x" * (exact - 1),
        "x" * exact,
        "x" * (exact + 1),
        "y",
        list(range(200_000)),
        "ä€😀" * 3000,
        {"a": None},
    ]


def _rank_main(rank: int, port: int, results: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    group = RankGroup(RankAddress(rank, 2, rank, 2), torch.device("cpu"), "gloo", 60)
    group.end_start_up()
    received = [group.broadcast_json(message if rank == 0 else None) for message in _messages()]
    texts = [group.gather_text(["", "é" * TEXT_BYTES][rank]), group.gather_text(f"rank {rank}")]
    gathered = group.all_gather(torch.full((2, 3), float(rank))).tolist()
    results.put((rank, received == _messages(), texts, gathered))
    group.gather_text("done")
    group.close()


def test_two_ranks_understand_each_other() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_rank_main, args=(rank, store.port, results), daemon=True) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            _, equal, texts, gathered = results.get(timeout=60)
            assert equal
            assert texts == [["", "é" * (TEXT_BYTES // 2)], ["rank 0", "rank 1"]]
            assert gathered == [[[0.0] * 3] * 2, [[1.0] * 3] * 2]
        for process in processes:
            process.join(30)
            assert process.exitcode == 0, "closing the group lets the process end in order"
    finally:
        for process in processes:
            process.kill()


def test_rank_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert RankAddress.from_environment() is None
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert RankAddress.from_environment() == RankAddress(5, 8, 5, 8)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert RankAddress.from_environment() == RankAddress(5, 8, 1, 4)


def test_wrong_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from placement.plan import PlacementPlan

    plan = PlacementPlan("m", 2, 1, (0,), (((0,), (1,)),))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ModelError, match="3 ranks were started, the plan is for 2 GPUs"):
        start_run(plan, "m", EngineSettings())


@pytest.mark.parametrize(("gpus", "name", "local_ranks", "expected"), [
    (0, "auto", 2, "cpu"),
    (1, "auto", 2, "cpu"),
    (2, "auto", 2, "cuda:1"),
    (4, "cpu", 2, "cpu"),
    (1, "cuda", 2, "cuda:0"),
])  # fmt: skip
def test_device(monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, local_ranks: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(name, RankAddress(1, local_ranks, 1, local_ranks)) == torch.device(expected)


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match="no NVIDIA GPU"):
        choose_device("cuda", RankAddress(0, 1, 0, 1))


def test_settings() -> None:
    settings = EngineSettings.from_config({"max_sequences": 3, "rank_timeout_s": 2.5, "port": 1, "dtype": "bfloat16"})
    assert (settings.max_sequences, settings.rank_timeout_s, settings.weights) == (3, 2.5, "checkpoint")
    assert settings.torch_dtype(torch.device("cpu")) == torch.bfloat16
    assert EngineSettings().torch_dtype(torch.device("cpu")) == torch.float32
    assert EngineSettings().torch_dtype(torch.device("cuda", 0)) == "auto"


def test_local_ranks_are_watched_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    import queue

    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, os.environ.get(name, "lo" if name.startswith("GLOO") else ""))
    deaths: queue.Queue[str] = queue.Queue()
    ranks = LocalRanks(3, ["--help"])  # every rank prints its help and ends with code 0
    ranks.on_death = deaths.put
    try:
        assert deaths.get(timeout=60) in ("rank 1 exited with code 0", "rank 2 exited with code 0")
    finally:
        ranks.kill()
    assert all(process.returncode is not None for process in ranks._processes.values())
    with pytest.raises(queue.Empty):
        deaths.get(timeout=0.5)


@pytest.mark.parametrize("size", [None, "two"])
def test_half_an_address(size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ModelError, match="no address among ranks"):
        RankAddress.from_environment()
