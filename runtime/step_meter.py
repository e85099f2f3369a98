"""What the engine's steps give: their times, tokens per second, and the load of the experts' slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.load import Load
from runtime.requests import StepTime

TAKE_INTERVAL_S = 1.0  # the load is read from the device about so often
RECENT_LOADS = 2  # that make the window
WINDOW_S = 3.0  # loads that are older than this are past


@dataclass(frozen=True)
class MeterReading:
    """What a meter shows.

    Attributes:
        tokens_per_s: given to requests within the window.
        recent: load of the window; None where nothing ran in it.
        total: load since the start; None before the first step.
    """

    tokens_per_s: float
    recent: Load | None
    total: Load | None


@dataclass(frozen=True)
class _Taken:
    """A load, when it was read, and the time and tokens that it covers."""

    at_s: float
    covers_s: float
    tokens: int
    load: Load


class StepMeter:
    """Kept by the engine's thread, read by others.

    Args:
        take_load: the worker's, called from the engine's thread between steps.
        clock: seconds.

    Attributes:
        on_decode_step: told the seconds of every step that decodes and feeds no prompts beside.
    """

    def __init__(self, take_load: Callable[[], Load | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._take_load, self._clock = take_load, clock
        self._lock = threading.Lock()
        self._taken: deque[_Taken] = deque(maxlen=RECENT_LOADS)
        self._total: Load | None = None
        self._tokens = 0
        self._since_s: float | None = None  # when the first step began whose load is not yet taken
        self.on_decode_step: Callable[[float], None] = lambda seconds: None

    def stepped(self, step: StepTime, num_tokens: int) -> None:
        """A step ended that gave so many tokens; one that fed nothing does not count."""
        if not step.batch and not step.prompt_tokens:
            return
        now = self._clock()
        if self._since_s is None:
            self._since_s = now - step.seconds
        self._tokens += num_tokens
        if not step.prompt_tokens:
            self.on_decode_step(step.seconds)
        if now - self._since_s >= TAKE_INTERVAL_S:
            self._take(self._since_s)
            self._since_s = now

    def idle(self) -> None:
        """Nothing is to be done: what is not yet counted is taken while nobody waits."""
        if self._since_s is not None:
            self._take(self._since_s)
            self._since_s = None

    def _take(self, since_s: float) -> None:
        load, now = self._take_load(), self._clock()
        if load is not None:
            with self._lock:
                self._taken.append(_Taken(now, now - since_s, self._tokens, load))
                self._total = load if self._total is None else self._total + load
        self._tokens = 0

    def read(self) -> MeterReading:
        """What the meter shows now; from any thread."""
        now = self._clock()
        with self._lock:
            recent = [taken for taken in self._taken if now - taken.at_s < WINDOW_S]
            total = self._total
        if not recent:
            return MeterReading(0.0, None, total)
        window = recent[0].load
        for taken in recent[1:]:
            window += taken.load
        # What took less than a second counts as one, so that a single token does not look like thousands.
        seconds = max(sum(taken.covers_s for taken in recent), TAKE_INTERVAL_S)
        return MeterReading(sum(taken.tokens for taken in recent) / seconds, window, total)
