"""Steps that do not end are noticed, and ranks that live no more are named."""

from __future__ import annotations

import queue
import time

import torch.distributed as dist

from runtime.heartbeat import PERIOD_S, Heartbeat
from runtime.step_watch import StepWatch


def test_a_step_is_overdue_once_nothing_has_ended_for_too_long() -> None:
    now = 0.0
    watch = StepWatch(10, lambda line: None, lambda: now)
    now = 100.0
    assert not watch.is_overdue(), "nothing is under way"
    watch.began()
    now = 109.0
    watch.began()  # the next one, launched while the first is under way
    assert not watch.is_overdue()
    now = 111.0
    assert watch.is_overdue()
    watch.ended()
    assert not watch.is_overdue(), "the second has its own time"
    now = 122.0
    assert watch.is_overdue()
    watch.ended()
    assert not watch.is_overdue()


def test_an_overdue_step_is_said_once() -> None:
    said: queue.Queue[str] = queue.Queue()
    watch = StepWatch(0.05, said.put)
    watch.began()
    watch.start()
    assert said.get(timeout=10) == "a step did not end within 0.05 s"


def test_silent_ranks_are_named() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    beats = [Heartbeat(dist.TCPStore("127.0.0.1", store.port), rank, 3) for rank in range(3)]
    time.sleep(2 * PERIOD_S)
    assert beats[0].silent() == []
    beats[2].end()
    deadline = time.monotonic() + 30
    while not beats[0].silent():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert beats[0].silent() == [2], "rank 1 goes on counting"
    for beat in beats:
        beat.end()
