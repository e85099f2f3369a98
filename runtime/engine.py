"""The engine on rank 0: takes requests, plans the steps of all ranks, hands out tokens.

One thread runs `schedule → execute → hand out` until it is told to stop or fails; everything else talks to it through
`submit` and `cancel`, from any thread.
"""

from __future__ import annotations

import itertools
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from profiler.errors import InputError
from runtime.requests import EngineError, EngineStatus, SamplingParameters, TokenEvent
from runtime.settings import EngineSettings
from runtime.step_plan import Admission, StepPlan
from runtime.worker_interface import NO_TOKEN, Worker

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0  # an idle engine still sends empty plans, so that waiting ranks don't run into their timeout
CAUSE_S = 1.0  # how long a failed step waits for its cause to be found


@dataclass
class _Request:
    number: int
    prompt: list[int]
    sampling: SamplingParameters
    on_event: Callable[[TokenEvent], None]
    generated: int = 0
    home: int = 0
    cancelled: bool = False


class Engine:
    """Decodes requests together on all ranks; see `runtime.requests.EngineProtocol`.

    Args:
        worker: rank 0's worker; the other ranks run `Worker.serve`.
        settings: limits of a batch.
        eos_token_ids: tokens that end a sequence.
        max_context: the most tokens of one sequence, prompt and generated.
    """

    def __init__(
        self, worker: Worker, settings: EngineSettings, eos_token_ids: Sequence[int], max_context: int
    ) -> None:
        self.max_context = max_context
        self._worker, self._settings = worker, settings
        self._eos = frozenset(eos_token_ids)
        self._numbers = itertools.count()
        self._waiting: deque[_Request] = deque()
        self._running: dict[int, _Request] = {}
        self._retire: list[int] = []
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
    ) -> int:
        """Queue a request; see `EngineProtocol.submit`."""
        prompt = [int(token) for token in prompt_token_ids]
        if not prompt or len(prompt) + sampling.max_tokens > self.max_context:
            raise InputError(
                f"prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens}: expected at least one prompt "
                f"token and at most {self.max_context} in all; shorten the prompt or ask for fewer"
            )
        with self._changed:
            if self._failure is not None or self._stopping:
                raise EngineError(self._failure or "the engine is shutting down")
            if sampling.seed is None:
                sampling = replace(sampling, seed=random.getrandbits(62))
            request = _Request(next(self._numbers), prompt, sampling, on_event)
            self._waiting.append(request)
            self._changed.notify()
        return request.number

    def cancel(self, request_id: int) -> None:
        """End a request early; see `EngineProtocol.cancel`."""
        with self._changed:
            for request in (*self._waiting, *self._running.values()):
                if request.number == request_id:
                    request.cancelled = True
            self._changed.notify()

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        with self._changed:
            ready = self._thread.is_alive() and not self._stopping and self._failure is None
            return EngineStatus(ready, self._failure, len(self._running), len(self._waiting))

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
            orphans = [*self._running.values(), *self._waiting]
            self._waiting.clear()
            self._running.clear()
        for request in orphans:
            request.on_event(TokenEvent(None, "error", reason))

    # --- the engine's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                step = self._schedule()
                self._worker.group.broadcast_json(step.to_json())
                if step.stop:
                    break
                self._hand_out(self._worker.execute(step))
        except Exception as error:
            logger.debug("engine thread", exc_info=True)
            with self._changed:  # whoever watches the ranks can say which one died; let that be the reason
                self._changed.wait_for(lambda: self._failure is not None, CAUSE_S)
            self.fail(f"a decoding step failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        else:
            self._end_all("the server is shutting down")

    def _schedule(self) -> StepPlan:
        """Decide the next step; waits while there is nothing to do."""
        with self._changed:
            idle = not self._running and not self._waiting and not self._stopping
            if idle and not self._retire:
                self._changed.wait(min(HEARTBEAT_S, self._settings.rank_timeout_s / 4))
            self._drop_cancelled()
            retire, self._retire = self._retire, []
            if self._stopping or self._failure is not None:
                return StepPlan(stop=True)
            return StepPlan(retire, self._admit(retire))

    def _drop_cancelled(self) -> None:
        for request in [request for request in self._waiting if request.cancelled]:
            self._waiting.remove(request)
            request.on_event(TokenEvent(None, "cancelled"))
        for number in [number for number, request in self._running.items() if request.cancelled]:
            self._end(self._running[number], TokenEvent(None, "cancelled"))

    def _admit(self, retiring: list[int]) -> list[Admission]:
        """Take waiting requests into the batch, as far as its limits and the cache allow."""
        if self._running and not self._worker.model.can_merge:
            return []
        admissions: list[Admission] = []
        longest = 0
        while self._waiting and len(self._running) < self._settings.max_sequences:
            request = self._waiting[0]
            longest = max(longest, len(request.prompt))
            if admissions and longest * (len(admissions) + 1) > self._settings.max_prefill_tokens:
                break
            if admissions and not self._worker.model.can_pad and len(request.prompt) != len(admissions[0].tokens):
                break
            sampling = request.sampling
            tokens = [len(admission.tokens) + admission.new_tokens for admission in admissions]
            if not self._worker.has_room([*tokens, len(request.prompt) + sampling.max_tokens], retiring):
                break
            self._waiting.popleft()
            request.home = self._choose_home()
            self._running[request.number] = request
            admissions.append(Admission(request.number, request.prompt, request.home, sampling, sampling.max_tokens))
        return admissions

    def _choose_home(self) -> int:
        """The rank with the fewest sequences (``allreduce`` samples everything on rank 0)."""
        if self._worker.everyone_holds_all:
            return 0
        sequences = [0] * self._worker.group.world_size
        for request in self._running.values():
            sequences[request.home] += 1
        return min(range(len(sequences)), key=lambda rank: (sequences[rank], rank))

    def _hand_out(self, tokens: dict[int, int]) -> None:
        """Tell each request its new token, and end those that are done."""
        with self._changed:
            for number, token in tokens.items():
                request = self._running.get(number)
                if request is None:
                    continue
                request.generated += 1
                if token == NO_TOKEN:
                    reason = "the model's logits are not finite for this request; serve with dtype=bfloat16 or float32"
                    self._end(request, TokenEvent(None, "error", reason))
                elif token in self._eos and not request.sampling.ignore_eos:
                    self._end(request, TokenEvent(None, "stop"))
                elif request.generated >= request.sampling.max_tokens:
                    self._end(request, TokenEvent(token, "length"))
                else:
                    request.on_event(TokenEvent(token, None))

    def _end(self, request: _Request, event: TokenEvent) -> None:
        del self._running[request.number]
        self._retire.append(request.number)
        request.on_event(event)
