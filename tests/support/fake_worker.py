"""A worker that plays back tokens instead of a model, and a listener, for tests of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from runtime.requests import TokenEvent
from runtime.step_plan import StepPlan

WAIT_S = 10


class FakeWorker:
    """Follows plans like a worker; ``tokens(sequence, step)`` gives each new token, and steps wait for ``allow``."""

    def __init__(
        self, *, world_size: int = 1, everyone: bool = True, can_merge: bool = True, can_pad: bool = True
    ) -> None:
        self.group = SimpleNamespace(world_size=world_size, broadcast_json=self._broadcast)
        self.model = SimpleNamespace(can_merge=can_merge, can_pad=can_pad)
        self.everyone_holds_all = everyone
        self.plans: list[StepPlan] = []
        self.sent_at: list[float] = []
        self.tokens: Callable[[int, int], int] = lambda sequence, step: 10 + sequence
        self.steps: dict[int, int] = {}
        self.gate = threading.Semaphore(0)
        self.free_running = True

    def _broadcast(self, message: Any) -> None:
        self.plans.append(StepPlan.from_json(message))
        self.sent_at.append(time.monotonic())

    def execute(self, plan: StepPlan) -> dict[int, int]:
        for sequence in plan.retire:
            del self.steps[sequence]  # a KeyError here means that the engine retired it twice, or never admitted it
        if not plan.admit and not self.steps:
            return {}
        if not self.free_running:
            assert self.gate.acquire(timeout=WAIT_S)
        taking_part = [admission.sequence for admission in plan.admit] or list(self.steps)
        for sequence in taking_part:
            self.steps[sequence] = self.steps.get(sequence, -1) + 1
        return {sequence: self.tokens(sequence, self.steps[sequence]) for sequence in taking_part}

    def take_load(self) -> None:
        return None

    def has_room(self, tokens: Sequence[int], retiring: Sequence[int]) -> bool:
        return True

    @property
    def admitted(self) -> list[list[int]]:
        """Sequences of every step that admitted any."""
        return [[admission.sequence for admission in plan.admit] for plan in self.plans if plan.admit]


class Listener:
    """Collects a request's events."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self._ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self._ended.set()

    def wait(self) -> list[TokenEvent]:
        assert self._ended.wait(WAIT_S)
        return self.events


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
