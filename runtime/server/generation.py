"""The bridge between the engine's thread and the event loop: token events in, pieces of text out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from starlette.types import Receive

from runtime.requests import SamplingParameters, TokenEvent, TokenLogprobs
from runtime.server.detokenizer import Detokenizer
from runtime.server.mailbox import Mailbox
from runtime.server.metered_engine import MeteredEngine
from runtime.server.stop_strings import StopMatcher


class GenerationError(RuntimeError):
    """The engine failed in the middle of a request; the message is one line that says why."""


class ClientDisconnected(Exception):
    """The client went away; nobody reads the answer."""


@dataclass(frozen=True)
class Submission:
    """One choice to generate: the prompt's token ids, how to sample, and on whose behalf."""

    prompt_token_ids: Sequence[int]
    sampling: SamplingParameters
    user: str = ""


@dataclass(frozen=True)
class ReportedToken:
    """A generated token with its log-probabilities; ``offset`` is how many characters of the text come before it."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class TextDelta:
    """A piece of text of one choice; the piece that has a finish reason is the choice's last.

    ``tokens`` are those that begin in it, if their log-probabilities are asked for.
    """

    choice: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    tokens: Sequence[ReportedToken] = ()


class Generation:
    """All choices of one HTTP request, from submission to the last piece of text.

    Lives on the event loop; ``close`` must be called in the end, and cancels what still runs.
    """

    def __init__(
        self,
        engine: MeteredEngine,
        submissions: Sequence[Submission],
        make_detokenizer: Callable[[], Detokenizer],
        stop_strings: Sequence[str],
    ) -> None:
        """Submit every choice.

        Raises:
            EngineError: the engine is down.
        """
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, TokenEvent] | Exception] = asyncio.Queue()
        self._watch: asyncio.Task[None] | None = None
        self._choices = [
            _Choice(index, submission.sampling, make_detokenizer(), stop_strings)
            for index, submission in enumerate(submissions)
        ]
        # Request ids by choice, of those that the engine has not ended as far as we know.
        self._running: dict[int, int] = {}
        self._open = set(range(len(submissions)))
        try:
            for index, submission in enumerate(submissions):
                self._running[index] = engine.submit(
                    submission.prompt_token_ids, submission.sampling, self._callback(index), submission.user
                )
        except BaseException:
            self.close()
            raise

    @property
    def num_choices(self) -> int:
        """How many choices the request has."""
        return len(self._choices)

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    async def deltas(self, receive: Receive) -> AsyncGenerator[TextDelta]:
        """The text of all choices as it comes.

        Args:
            receive: the request's ASGI channel, watched for the client's disconnection.

        Raises:
            GenerationError: the engine failed.
            ClientDisconnected: nobody listens any more.
        """
        self._watch = asyncio.create_task(self._watch_client(receive))
        while self._open:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            index, event = item
            if event.finish_reason is not None:
                self._running.pop(index, None)
            if index not in self._open:
                continue
            delta = self._choices[index].read(event)
            if delta.finish_reason is not None:
                self._open.discard(index)
                self._finish(index)
            if delta.text or delta.tokens or delta.finish_reason is not None:
                yield delta

    def abort(self, reason: str) -> None:
        """End ``deltas`` by a GenerationError that says ``reason``."""
        self._queue.put_nowait(GenerationError(reason))

    def close(self) -> None:
        """Cancel whatever still runs; may be called more than once."""
        for index in list(self._running):
            self._cancel(index)
        if self._watch is not None:
            self._watch.cancel()

    def _cancel(self, index: int) -> None:
        request_id = self._running.pop(index, None)
        if request_id is not None:
            self._engine.cancel(request_id)

    def _finish(self, index: int) -> None:
        request_id = self._running.pop(index, None)
        if request_id is not None:
            self._engine.finish(request_id)

    def _callback(self, index: int) -> Callable[[TokenEvent], None]:
        loop, queue = self._loop, self._queue
        mailbox = Mailbox.of(loop)

        def on_event(event: TokenEvent) -> None:  # called from the engine's thread
            mailbox.put(loop, queue, (index, event))

        return on_event

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(ClientDisconnected())


class _Choice:
    """Text of one choice: detokenisation, then stop strings."""

    def __init__(
        self, index: int, sampling: SamplingParameters, detokenizer: Detokenizer, stop_strings: Sequence[str]
    ) -> None:
        self.num_tokens = 0
        self._index = index
        self._min_tokens = sampling.min_tokens
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stop_strings)
        self._num_read = self._num_given = 0  # characters
        self._held: list[ReportedToken] = []

    def read(self, event: TokenEvent) -> TextDelta:
        """The text that an event adds, and the finish reason if it ends the choice or completes a stop string."""
        reason = event.finish_reason
        if reason == "error" or reason == "cancelled":
            raise GenerationError(event.error or "the engine cancelled the request")
        text = ""
        if event.token_id is not None:
            self.num_tokens += 1
            if event.logprobs is not None:
                self._held.append(ReportedToken(event.token_id, self._num_read, event.logprobs))
            text = self._detokenizer.push(event.token_id)
        if reason is not None:
            text += self._detokenizer.flush()
        self._num_read += len(text)
        text, stopped = self._matcher.push(text, may_stop=self.num_tokens > self._min_tokens)
        if stopped:
            return self._give(text, "stop")
        if reason is not None:
            text += self._matcher.flush()
        return self._give(text, reason)

    def _give(self, text: str, reason: Literal["stop", "length"] | None) -> TextDelta:
        """Tokens go out with the piece of text in which they begin; those after the cut at a stop string never do."""
        self._num_given += len(text)
        everything = reason is not None and self._num_given == self._num_read
        due = [token for token in self._held if everything or token.offset < self._num_given]
        self._held = self._held[len(due) :]
        return TextDelta(self._index, text, reason, due)
