"""The engine on rank 0: takes requests, has their steps planned and executed, hands out tokens.

One thread runs `plan → execute → hand out` until it is told to stop or fails; everything else talks to it through
`submit` and `cancel`, from any thread. Where the worker's device works by itself, the next step is under way before the
tokens of the last one are handed out; and while the same sequences go on, before they are even known.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from profiler.errors import InputError
from runtime.requests import EngineError, EngineStatus, QueueFull, SamplingParameters, StepTime, TokenEvent
from runtime.scheduler import Scheduler
from runtime.settings import EngineSettings
from runtime.step_meter import StepMeter
from runtime.step_plan import StepPlan
from runtime.waiting import Request
from runtime.worker_interface import NO_TOKEN, Tokens, Worker

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0  # an idle engine still sends empty plans, so that waiting ranks don't run into their timeout
CAUSE_S = 1.0  # how long a failed step waits for its cause to be found
STEP_TIMES = 64  # remembered
ADMISSIONS = 32  # whose pace says when a full queue has room again
LONGEST_RETRY_S = 60.0


class Engine:
    """Decodes requests together on all ranks; see `runtime.requests.EngineProtocol`.

    Args:
        worker: rank 0's worker; the other ranks run `Worker.serve`.
        settings: limits of a step.
        eos_token_ids: tokens that end a sequence.
        max_context: the most tokens of one sequence, prompt and generated.

    Attributes:
        meter: of its steps and of the load of the experts' slots.
    """

    def __init__(
        self, worker: Worker, settings: EngineSettings, eos_token_ids: Sequence[int], max_context: int
    ) -> None:
        self.max_context = max_context
        self.meter = StepMeter(worker.take_load)
        self._worker, self._settings = worker, settings
        self._eos = frozenset(eos_token_ids)
        self._numbers = itertools.count()
        self._scheduler = Scheduler(worker, settings)
        self._open: dict[int, Request] = {}
        self._cancelled: list[Request] = []
        self._events: list[tuple[Request, TokenEvent]] = []  # to be handed out
        self._generated = 0
        self._decode_steps = 0
        self._step_times: deque[StepTime] = deque(maxlen=STEP_TIMES)
        self._admitted_s: deque[float] = deque(maxlen=ADMISSIONS)
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin taking steps."""
        self._thread.start()

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParameters,
        on_event: Callable[[TokenEvent], None],
        user: str = "",
    ) -> int:
        """Queue a request; see `EngineProtocol.submit`."""
        prompt = [int(token) for token in prompt_token_ids]
        if not prompt or len(prompt) + sampling.max_tokens > self.max_context:
            raise InputError(
                f"prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens}: expected at least one prompt "
                f"token and at most {self.max_context} in all; shorten the prompt or ask for fewer"
            )
        vocabulary = self._worker.facts.vocabulary
        unknown = next((token for token in prompt if not 0 <= token < vocabulary), None)
        if unknown is not None:  # a tokenizer may have more tokens than its model
            raise InputError(
                f"token id {unknown}: expected 0 to {vocabulary - 1}, as many as the model has; leave it out"
            )
        with self._changed:
            if self._failure is not None or self._stopping:
                raise EngineError(self._failure or "the engine is shutting down")
            waiting = len(self._scheduler.waiting)
            if waiting >= self._settings.max_waiting:
                raise QueueFull(f"{waiting} requests are waiting, as many as may; try again later", self._retry_after())
            sampling = sampling.resolved(self._eos)
            request = Request(next(self._numbers), prompt, len(prompt), sampling, on_event, user)
            self._open[request.number] = request
            self._scheduler.add(request)
            self._changed.notify()
        return request.number

    def cancel(self, request_id: int) -> None:
        """End a request early; see `EngineProtocol.cancel`."""
        with self._changed:
            request = self._open.get(request_id)
            if request is not None and not request.cancelled:
                request.cancelled = True
                self._cancelled.append(request)
                self._changed.notify()

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        with self._changed:
            scheduler = self._scheduler
            return EngineStatus(
                ready=self._thread.is_alive() and not self._stopping and self._failure is None,
                failure=self._failure,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                cache_usage=scheduler.cache_usage,
                cache_tokens=scheduler.cache_tokens,
                preemptions=scheduler.preemptions,
                prefix_hit_tokens=scheduler.prefix_hit_tokens,
                prompt_tokens=scheduler.prompt_tokens,
                generated_tokens=self._generated,
                decode_steps=self._decode_steps,
                step_times=tuple(self._step_times),
            )

    def shutdown(self, timeout_s: float = 30.0) -> None:
        """Stop all ranks after the step under way; open requests end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def fail(self, reason: str) -> None:
        """Go down: open requests end with an error, new ones are refused. The first reason counts."""
        with self._changed:
            if self._failure is not None or (self._stopping and not self._thread.is_alive()):
                return
            self._failure = reason
            self._changed.notify()
        self._end_all(reason)

    def _end_all(self, reason: str) -> None:
        """Tell every open request, once, that it ends with an error."""
        with self._changed:
            self._hand_out()
            for request in list(self._open.values()):
                self._end(request, TokenEvent(None, "error", reason))
            self._hand_out()

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free, from the pace of the last admissions."""
        if len(self._admitted_s) < 2:
            return 1.0
        pace = (time.monotonic() - self._admitted_s[0]) / len(self._admitted_s)
        return min(max(pace, 1.0), LONGEST_RETRY_S)

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            logger.debug("engine thread", exc_info=True)
            with self._changed:  # whoever watches the ranks can say which one died; let that be the reason
                self._changed.wait_for(lambda: self._failure is not None, CAUSE_S)
            self.fail(f"a decoding step failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            self._end_all("the server is shutting down")

    def _loop(self) -> None:
        before: _Step | None = None  # under way
        while True:
            plan = self._plan_ahead() if before is not None else None
            if plan is None:
                if before is not None:
                    self._finish(before)
                    before = None
                plan = self._plan()
            if self._worker.group.world_size > 1:
                self._worker.group.broadcast_json(plan.to_json())
            if plan.stop:
                return
            start_s, batch = time.perf_counter(), self._scheduler.num_decoding
            step = _Step(self._worker.launch(plan), start_s, batch, plan.prompt_tokens)
            if before is not None:
                self._finish(before)
                step.start_s = time.perf_counter()  # one after the other
                before = None
            if self._worker.overlaps:
                before = step
            else:
                self._finish(step)
            with self._changed:
                self._hand_out()
            if not self._open:
                self.meter.idle()

    def _plan_ahead(self) -> StepPlan | None:
        """The next step, where it can be planned without the tokens of the one under way."""
        with self._changed:
            if self._stopping or self._failure is not None or self._cancelled:
                return None
            return self._scheduler.plan_ahead()

    def _plan(self) -> StepPlan:
        """The next step; waits while there is nothing to do."""
        with self._changed:
            scheduler = self._scheduler
            if not (self._open or self._stopping or scheduler.must_tell):
                self._hand_out()
                self._changed.wait(min(HEARTBEAT_S, self._settings.rank_timeout_s / 4))
            cancelled, self._cancelled = self._cancelled, []
            for request in cancelled:
                if request.number in self._open:
                    self._end(request, TokenEvent(None, "cancelled"))
            if self._stopping or self._failure is not None:
                return StepPlan(stop=True)
            plan = scheduler.plan()
            for admission in plan.admit:
                request = scheduler.running[admission.sequence]
                if request.queued_s is None:
                    self._admitted_s.append(time.monotonic())
                    request.queued_s = self._admitted_s[-1] - request.submitted_s
            return plan

    def _finish(self, step: _Step) -> None:
        """Wait for a step's tokens; end the requests that are done."""
        tokens = step.tokens()
        step_time = StepTime(time.perf_counter() - step.start_s, step.batch, step.prompt_tokens)
        self.meter.stepped(step_time, len(tokens))
        with self._changed:
            if step.batch:
                self._decode_steps += 1
                self._step_times.append(step_time)
            for number, token in tokens.items():
                request = self._scheduler.running.get(number)
                if request is not None:
                    self._take(request, token)

    def _take(self, request: Request, token: int) -> None:
        """A request's new token."""
        if token == NO_TOKEN:
            reason = "the model's logits are not finite for this request; serve with dtype=bfloat16 or float32"
            self._end(request, TokenEvent(None, "error", reason))
            return
        self._generated += 1
        self._scheduler.note(request, token)
        first, sampling = request.num_generated == 1, request.sampling
        if token in sampling.stop_token_ids:
            event = TokenEvent(None, "stop")
        else:
            event = TokenEvent(token, None, logprobs=self._worker.logprobs.get(request.number))
            if request.num_generated >= sampling.max_tokens:
                event = replace(event, finish_reason="length")
        if first:
            event = replace(event, queued_s=request.queued_s, cached_tokens=request.cached)
        if event.finish_reason is None:
            self._events.append((request, event))
        else:
            self._end(request, event)

    def _end(self, request: Request, event: TokenEvent) -> None:
        self._scheduler.end(request)
        del self._open[request.number]
        if self._worker.recording is not None:
            self._worker.recording.end(request.number, request.tokens, request.num_generated)
        self._events.append((request, event))

    def _hand_out(self) -> None:
        """Tell requests what has happened; the lock is held, so that their events keep their order."""
        while self._events:
            events, self._events = self._events, []
            for request, event in events:
                request.on_event(event)


@dataclass
class _Step:
    """A step under way.

    Attributes:
        tokens: waits for its tokens.
        start_s: when it began.
        batch: sequences that it decodes.
        prompt_tokens: that it feeds.
    """

    tokens: Tokens
    start_s: float
    batch: int
    prompt_tokens: int
