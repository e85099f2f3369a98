"""The engine with a stopwatch per request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from runtime.requests import EngineProtocol, EngineStatus, SamplingParameters, TokenEvent
from runtime.server.metrics import Metrics


class MeteredEngine:
    """Passes everything on, see `EngineProtocol`, and times what comes back. A choice counts as a request.

    Args:
        engine: does the work.
        metrics: gets the times and counts.
        clock: seconds.
    """

    def __init__(
        self, engine: EngineProtocol, metrics: Metrics, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        self._watches: dict[int, _Watch] = {}

    @property
    def max_context(self) -> int:
        """See `EngineProtocol.max_context`."""
        return self._engine.max_context

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParameters,
        on_event: Callable[[TokenEvent], None],
        user: str = "",
    ) -> int:
        """See `EngineProtocol.submit`."""
        watch = _Watch(self._metrics, self._clock)

        def relay(event: TokenEvent) -> None:
            watch.see(event)
            if event.finish_reason is not None:
                self._forget(watch)
            on_event(event)

        request_id = self._engine.submit(prompt_token_ids, sampling, relay, user)
        self._metrics.prompt_tokens.inc(len(prompt_token_ids))
        self._metrics.prompt_length.observe(len(prompt_token_ids))
        watch.request_id = request_id
        self._watches[request_id] = watch
        if watch.ended:  # before its id was known
            self._forget(watch)
        return request_id

    def cancel(self, request_id: int) -> None:
        """See `EngineProtocol.cancel`."""
        self._engine.cancel(request_id)

    def finish(self, request_id: int) -> None:
        """End a request whose answer is complete, because of a stop string."""
        watch = self._watches.get(request_id)
        if watch is not None:
            watch.end("stop")
        self._engine.cancel(request_id)

    def status(self) -> EngineStatus:
        """See `EngineProtocol.status`."""
        return self._engine.status()

    def shutdown(self) -> None:
        """See `EngineProtocol.shutdown`."""
        self._engine.shutdown()

    def _forget(self, watch: _Watch) -> None:
        if watch.request_id is not None:
            self._watches.pop(watch.request_id, None)


class _Watch:
    """Times of one request; `see` is called from the engine's thread."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.request_id: int | None = None
        self.ended = False
        self._metrics, self._clock = metrics, clock
        self._start_s = clock()
        self._last_s: float | None = None
        self._num_tokens = 0

    def see(self, event: TokenEvent) -> None:
        """Note a token, or the end."""
        if event.token_id is not None and not self.ended:
            now = self._clock()
            if self._last_s is None:
                self._metrics.time_to_first_token.observe(now - self._start_s)
            else:
                self._metrics.inter_token_latency.observe(now - self._last_s)
            self._last_s = now
            self._num_tokens += 1
            self._metrics.generation_tokens.inc()
        if event.queued_s is not None:
            self._metrics.queue_time.observe(event.queued_s)
        if event.finish_reason is not None:
            self.end(event.finish_reason)

    def end(self, reason: str) -> None:
        """Note the end, once."""
        if self.ended:
            return
        self.ended = True
        self._metrics.requests_ended.labels(reason).inc()
        self._metrics.answer_length.observe(self._num_tokens)
        if reason in ("stop", "length"):
            self._metrics.request_latency.observe(self._clock() - self._start_s)
