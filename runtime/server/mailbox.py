"""From other threads to queues of an event loop, many items at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox] = WeakKeyDictionary()


class Mailbox:
    """Carries items to queues of one event loop, in the order in which they are put.

    Waking a loop is a system call, in which a thread lets go of the interpreter. An engine that brings tokens to many
    requests would lose it once for each; so the loop is woken once for all that come before it looks.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> Mailbox:
        """The mailbox of an event loop; called on the loop."""
        return _mailboxes.setdefault(loop, Mailbox())

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], item: Any) -> None:
        """Bring an item to a queue of the mailbox's loop, from any thread; a closed loop gets nothing."""
        self._items.append((queue, item))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False  # first, so that what comes from here on wakes the loop again
        while self._items:
            queue, item = self._items.popleft()
            queue.put_nowait(item)
