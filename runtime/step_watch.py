"""Notices a step that does not end: on GPUs a rank waits without end for the rows of one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

CHECKS = 8  # within the timeout


class StepWatch:
    """Watches from a thread of its own.

    Args:
        timeout_s: that a step, or the start of it, may take.
        on_overdue: called once, with a line that says so.
        clock: in seconds.
    """

    def __init__(
        self, timeout_s: float, on_overdue: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._timeout_s, self._on_overdue, self._clock = timeout_s, on_overdue, clock
        self._under_way = 0
        self._progress_s = clock()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Watch until the process ends."""
        threading.Thread(target=self._watch, name="step-watch", daemon=True).start()

    def began(self) -> None:
        """A step begins."""
        with self._lock:
            if self._under_way == 0:
                self._progress_s = self._clock()
            self._under_way += 1

    def ended(self) -> None:
        """The oldest step under way has ended."""
        with self._lock:
            self._under_way -= 1
            self._progress_s = self._clock()

    def is_overdue(self) -> bool:
        """Whether a step has been under way for too long."""
        with self._lock:
            return self._under_way > 0 and self._clock() - self._progress_s > self._timeout_s

    def _watch(self) -> None:
        while not self.is_overdue():
            time.sleep(self._timeout_s / CHECKS)
        self._on_overdue(f"a step did not end within {self._timeout_s:g} s")
