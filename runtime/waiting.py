"""Requests that wait for a place: whose turn it is."""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from runtime.pages import Name
from runtime.requests import SamplingParameters, TokenEvent


@dataclass(eq=False)
class Request:
    """A request from its submission to its end.

    Attributes:
        number: in the order of submission; also of its sequence.
        tokens: the prompt's, then those generated and known.
        num_prompt: how many of them are the prompt's.
        sampling: the seed is a number.
        on_event: takes its events.
        user: on whose behalf.
        home: the rank that samples it, once admitted.
        fed: tokens that have been fed by all steps planned so far.
        to_feed: tokens to feed before it decodes.
        pages: that it holds.
        names: of its first full pages.
        num_named: its first pages that others can find.
        passed: later requests that were admitted while this one did not fit.
        preempted: it lost its pages and waits to go on.
        cancelled: it is to end.
        submitted_s: when, on the monotonic clock.
        queued_s: from submission to its first admission.
        cached: prompt tokens that were in the cache when it was first admitted.
    """

    number: int
    tokens: list[int]
    num_prompt: int
    sampling: SamplingParameters
    on_event: Callable[[TokenEvent], None]
    user: str = ""
    home: int = 0
    fed: int = 0
    to_feed: int = 0
    pages: list[int] = field(default_factory=list)
    names: list[Name] = field(default_factory=list)
    num_named: int = 0
    passed: int = 0
    preempted: bool = False
    cancelled: bool = False
    submitted_s: float = field(default_factory=time.monotonic)
    queued_s: float | None = None
    cached: int = 0

    @property
    def num_generated(self) -> int:
        """Tokens generated and known."""
        return len(self.tokens) - self.num_prompt

    @property
    def decodes(self) -> bool:
        """Whether all that it begins with has been fed."""
        return self.fed >= self.to_feed


class WaitingRequests:
    """Preempted requests first, in the order of submission; then the users in turn, each one's in that order.

    Requests without a user are one user's.
    """

    def __init__(self) -> None:
        self._preempted: list[Request] = []
        self._of_user: dict[str, deque[Request]] = {}  # the first one's turn it is
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        """All of them, in the order in which they are to be admitted."""
        yield from self._preempted
        queues = [iter(queue) for queue in self._of_user.values()]
        while queues:
            going_on = []
            for queue in queues:
                request = next(queue, None)
                if request is not None:
                    going_on.append(queue)
                    yield request
            queues = going_on

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._of_user.setdefault(request.user, deque()).append(request)
        self._count += 1

    def put_back(self, request: Request) -> None:
        """Queue a preempted request."""
        request.preempted = True
        bisect.insort(self._preempted, request, key=lambda other: other.number)
        self._count += 1

    def take(self, request: Request) -> None:
        """Take a request out because its turn has come; its user's next one comes after all others'."""
        is_turn = not request.preempted
        self.remove(request)
        if is_turn and request.user in self._of_user:
            self._of_user[request.user] = self._of_user.pop(request.user)

    def remove(self, request: Request) -> None:
        """Forget a request; its user keeps the turn."""
        self._count -= 1
        if request.preempted:
            self._preempted.remove(request)
            request.preempted = False
            return
        queue = self._of_user[request.user]
        queue.remove(request)
        if not queue:
            del self._of_user[request.user]
