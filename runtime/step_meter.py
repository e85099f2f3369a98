"""How the engine's steps go: their times, the tokens they give, and the load of the experts' slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.load import Load

RECENT_STEPS = 64
TAKE_INTERVAL_S = 1.0  # the load is read from the device about so often
RECENT_LOADS = 2  # that make the window
WINDOW_S = 3.0  # loads that are older than this are past


@dataclass(frozen=True)
class MeterReading:
    """What a meter shows.

    Attributes:
        steps: decode steps since the start.
        step_s: of the last decode steps, ascending.
        tokens_per_s: given to requests within the window.
        recent: load of the window; None where nothing ran in it.
        total: load since the start; None before the first step.
    """

    steps: int
    step_s: list[float]
    tokens_per_s: float
    recent: Load | None
    total: Load | None

    def step_quantile(self, share: float) -> float | None:
        """Time in s that so large a share of the last decode steps took at most; None before the first."""
        return self.step_s[min(int(share * len(self.step_s)), len(self.step_s) - 1)] if self.step_s else None


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
    """

    def __init__(self, take_load: Callable[[], Load | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._take_load, self._clock = take_load, clock
        self._lock = threading.Lock()
        self._step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._taken: deque[_Taken] = deque(maxlen=RECENT_LOADS)
        self._total: Load | None = None
        self._steps = 0
        self._tokens = 0
        self._pending = False  # steps since the load was last taken
        self._since_s = clock()
        self.on_decode_step: Callable[[float], None] = lambda step_s: None

    def stepped(self, step_s: float, num_tokens: int, decoding: bool) -> None:
        """A step that gave so many tokens took so long."""
        with self._lock:
            if not self._pending:
                self._since_s = self._clock() - step_s
            self._pending = True
            self._tokens += num_tokens
            if decoding:
                self._steps += 1
                self._step_s.append(step_s)
        if decoding:
            self.on_decode_step(step_s)
        if self._clock() - self._since_s >= TAKE_INTERVAL_S:
            self._take()

    def idle(self) -> None:
        """Nothing is to be done: what is not yet counted is taken while nobody waits."""
        if self._pending:
            self._take()

    def _take(self) -> None:
        load, now = self._take_load(), self._clock()
        with self._lock:
            if load is not None:
                self._taken.append(_Taken(now, max(now - self._since_s, 1e-9), self._tokens, load))
                self._total = load if self._total is None else self._total + load
            self._tokens, self._pending, self._since_s = 0, False, now

    def read(self) -> MeterReading:
        """What the meter shows now; from any thread."""
        with self._lock:
            now = self._clock()
            recent = [taken for taken in self._taken if now - taken.at_s < WINDOW_S]
            seconds = sum(taken.covers_s for taken in recent)
            window = None
            for taken in recent:
                window = taken.load if window is None else window + taken.load
            return MeterReading(
                steps=self._steps,
                step_s=sorted(self._step_s),
                tokens_per_s=sum(taken.tokens for taken in recent) / max(seconds, TAKE_INTERVAL_S) if recent else 0.0,
                recent=window,
                total=self._total,
            )
