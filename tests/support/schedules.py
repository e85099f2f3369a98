"""Requests that come and go at given steps of an engine, so that the same schedule always makes the same plans."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engine import Engine
from runtime.requests import SamplingParameters, TokenEvent
from runtime.settings import EngineSettings
from runtime.step_plan import StepPlan

WAIT_S = 60
NEVER = 1 << 30  # as a step: only once all requests before it have ended


@dataclass(frozen=True)
class Arrival:
    """A request of a schedule.

    Attributes:
        step: of the engine, before which it is submitted; or when all earlier ones have ended, if that is sooner.
        prompt: token ids.
        max_tokens: to generate.
        cancel_after: it is cancelled with its event of this number, None never.
        user: on whose behalf.
        sampling: further parameters.
    """

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    cancel_after: int | None = None
    user: str = ""
    sampling: tuple[tuple[str, Any], ...] = (("temperature", 0.0),)


class Play:
    """Plays a schedule on an engine of its own, whose worker must be at rest.

    Args:
        worker: rank 0's.
        settings: of the engine.
        schedule: by rising step.
        eos: tokens that end a sequence.

    Attributes:
        events: of every request, in the order of the schedule.
        plans: what the worker was given.
        engine: the engine, shut down.
    """

    def __init__(
        self,
        worker: Any,
        settings: EngineSettings,
        schedule: Sequence[Arrival],
        max_context: int = 1 << 20,
        eos: tuple[int, ...] = (),
    ) -> None:
        self.events: list[list[TokenEvent]] = [[] for _ in schedule]
        self.plans: list[StepPlan] = []
        self._schedule, self._submitted, self._ended = schedule, 0, 0
        self._done = threading.Event()
        launch = worker.launch
        worker.launch = lambda plan: (self._before_step(), self.plans.append(plan), launch(plan))[-1]
        self.engine = Engine(worker, settings, eos, max_context)
        self._submit(max(1, sum(arrival.step == 0 for arrival in schedule)))
        self.engine.start()
        done = self._done.wait(WAIT_S)
        # Else the worker would still hold what has ended.
        while done and self.engine.status().ready and self.engine._scheduler.must_tell:
            time.sleep(0.001)
        self.status = self.engine.status()
        self.engine.shutdown()
        worker.launch = launch
        assert done, f"no end: {self.status}, {self.events}"
        assert self.status.failure is None, self.status.failure

    def _before_step(self) -> None:
        due = sum(arrival.step <= len(self.plans) for arrival in self._schedule)
        self._submit(due - self._submitted)

    def _submit(self, count: int) -> None:
        for number in range(self._submitted, self._submitted + count):
            arrival = self._schedule[number]
            self._submitted += 1
            sampling = SamplingParameters(max_tokens=arrival.max_tokens, **dict(arrival.sampling))
            self.engine.submit(arrival.prompt, sampling, self._listener(number), arrival.user)

    def _listener(self, number: int) -> Callable[[TokenEvent], None]:
        def on_event(event: TokenEvent) -> None:
            self.events[number].append(event)
            if len(self.events[number]) == self._schedule[number].cancel_after:
                self.engine.cancel(number)
            if event.finish_reason is not None:
                self._ended += 1
                if self._ended == len(self._schedule) or event.finish_reason == "error":
                    self._done.set()
                elif self._ended == self._submitted:
                    self._submit(1)

        return on_event

    def check_against(self, alone: Sequence[Sequence[int]]) -> None:
        """See `check_events`."""
        check_events(self.events, self._schedule, alone)


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    """What a request was given."""
    return [event.token_id for event in events if event.token_id is not None]


def check_events(
    events: Sequence[Sequence[TokenEvent]], schedule: Sequence[Arrival], alone: Sequence[Sequence[int]]
) -> None:
    """Every request got the tokens that it gets alone, once each and in order, up to its end."""
    for number, (own, arrival, expected) in enumerate(zip(events, schedule, alone, strict=True)):
        found = tokens_of(own)
        assert found == list(expected[: len(found)]), f"request {number}: {found}, alone {expected}"
        assert [event.finish_reason for event in own[:-1]] == [None] * (len(own) - 1)
        if own[-1].finish_reason == "cancelled":
            assert arrival.cancel_after is not None
        else:
            assert len(found) == len(expected), f"request {number}: {own[-1]}"
