"""What the server and the engine say to each other: tokens in, tokens out, no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from profiler.errors import InputError

FinishReason = Literal["stop", "length", "error", "cancelled"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object, least: float, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


class EngineError(RuntimeError):
    """The engine is down and takes no requests; the message is one line that says why."""


class QueueFull(EngineError):
    """As many requests wait as may.

    Attributes:
        retry_after_s: after so many seconds there is likely to be room.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class SamplingParameters:
    """How the engine chooses the next tokens of one request.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token (greedy).
        top_p: probability mass of the nucleus that is sampled from, in (0, 1].
        seed: makes the request's draws repeatable; None draws afresh.
        max_tokens: the most tokens to generate, at least 1.
        ignore_eos: go on after an end-of-sequence token (for measurements).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse what would fail in the middle of a step, and with it all other requests.

        Raises:
            InputError: a value has the wrong type or is out of range.
        """
        for name, fits, expected in (
            ("temperature", _is_number(self.temperature) and 0 <= self.temperature < math.inf, "a number from 0 on"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1"),
            ("seed", self.seed is None or _is_integer(self.seed, -(2**63), 2**63 - 1), "null or a 64-bit integer"),
            ("max_tokens", _is_integer(self.max_tokens, 1), "an integer of at least 1"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)}: expected {expected}")


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request; the event that has a finish reason is the request's last.

    Attributes:
        token_id: the generated token, or None where the event carries none: an end-of-sequence token arrives as
            ``token_id=None, finish_reason="stop"``.
        finish_reason: None while the request goes on. ``"length"`` comes together with the last token.
        error: one line that says what went wrong, with ``finish_reason="error"``.
        queued_s: with a request's first token: how long it waited for a place in the batch.
        cached_tokens: with a request's first token: how many of its prompt's tokens the cache held already.
    """

    token_id: int | None
    finish_reason: FinishReason | None
    error: str | None = None
    queued_s: float | None = field(default=None, compare=False)
    cached_tokens: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StepTime:
    """How long a step took that decoded.

    Attributes:
        seconds: from its start, or the end of the one before it, until its tokens were known.
        batch: sequences that it decoded.
        prompt_tokens: that it fed besides.
    """

    seconds: float
    batch: int
    prompt_tokens: int = 0


@dataclass(frozen=True)
class EngineStatus:
    """What the engine is doing now.

    Attributes:
        ready: requests are taken.
        failure: one line that says why the engine is down; None while it is not.
        running: requests that are being decoded, or their prompts fed.
        waiting: requests that wait for a place in the batch.
        cache_usage: share of the cache that running requests hold, from 0 to 1; 0 where it grows as needed.
        cache_tokens: tokens that the cache has room for; 0 where it grows as needed.
        preemptions: times that a request lost its part of the cache and had to wait again.
        prefix_hit_tokens: tokens of admitted requests that the cache held already.
        prompt_tokens: of all admitted requests.
        generated_tokens: of all requests.
        decode_steps: steps that decoded any request.
        step_times: of the last of these steps, the newest last.
    """

    ready: bool
    failure: str | None
    running: int
    waiting: int
    cache_usage: float = 0.0
    cache_tokens: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    step_times: tuple[StepTime, ...] = ()


class EngineProtocol(Protocol):
    """The engine as the server sees it; every method may be called from any thread."""

    @property
    def max_context(self) -> int:
        """The most tokens a request may have, prompt and generated ones together."""
        ...

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParameters,
        on_event: Callable[[TokenEvent], None],
        user: str = "",
    ) -> int:
        """Queue a request and return its id; ``on_event`` is called from the engine's own thread.

        Waiting requests of several users are admitted in turn.

        Raises:
            QueueFull: as many requests wait as may.
            EngineError: the engine is down.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """End a request early; a running one emits ``finish_reason="cancelled"``, unknown ids are ignored."""
        ...

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        ...

    def shutdown(self) -> None:
        """Stop the engine and free what it holds."""
        ...
