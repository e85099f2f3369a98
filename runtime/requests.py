"""What the server and the engine say to each other: tokens in, tokens out, no text."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from profiler.errors import InputError

FinishReason = Literal["stop", "length", "error", "cancelled"]

MAX_LOGPROBS = 20
LEAST_LOGPROB = -9999.0  # stands for 0 probability too, whose logarithm JSON cannot carry
REPETITION_PENALTIES = 0.01, 100.0  # beyond them float32 logits overflow


def _is_number(value: object, least: float, most: float = sys.float_info.max) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: object, least: float, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    each_once = len({token for token, _ in pairs}) == len(pairs)
    return each_once and all(_is_integer(token, 0) and _is_number(value, -100, 100) for token, value in pairs)


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
    """How the engine chooses the next tokens of one request; `runtime.sampling` says in which order the fields act.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token (greedy).
        top_p: probability mass of the nucleus that is sampled from, in (0, 1].
        seed: makes the request's draws repeatable; None draws afresh.
        max_tokens: the most tokens to generate, at least 1.
        ignore_eos: go on after an end-of-sequence token (for measurements).
        top_k: sample from so many of the most likely tokens; 0 from all.
        min_p: sample from tokens that are at least so likely as this share of the most likely one, in [0, 1].
        presence_penalty: subtracted from the logit of every token that was generated before.
        frequency_penalty: subtracted as often as the token was generated before.
        repetition_penalty: divisor of positive logits, factor of negative ones, of tokens in the prompt or generated.
        logit_bias: (token id, what is added to its logit), each token once.
        min_tokens: nothing ends the sequence before so many tokens, at most ``max_tokens``.
        stop_token_ids: tokens that end the sequence, beside those that the model names.
        logprobs: how many of the most likely tokens to report with each token; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 16
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse what would fail in the middle of a step, and with it all other requests.

        Raises:
            InputError: a value has the wrong type or is out of range.
        """
        low, high = REPETITION_PENALTIES
        for name, fits, expected in (
            ("temperature", _is_number(self.temperature, 0), "a number from 0 on"),
            ("top_p", _is_number(self.top_p, 0, 1) and self.top_p > 0, "a number above 0 and at most 1"),
            ("seed", self.seed is None or _is_integer(self.seed, -(2**63), 2**63 - 1), "null or a 64-bit integer"),
            ("max_tokens", _is_integer(self.max_tokens, 1), "an integer of at least 1"),
            ("top_k", _is_integer(self.top_k, 0), "an integer from 0 on"),
            ("min_p", _is_number(self.min_p, 0, 1), "a number from 0 to 1"),
            ("presence_penalty", _is_number(self.presence_penalty, -2, 2), "a number from -2 to 2"),
            ("frequency_penalty", _is_number(self.frequency_penalty, -2, 2), "a number from -2 to 2"),
            ("repetition_penalty", _is_number(self.repetition_penalty, low, high), f"a number from {low} to {high}"),
            ("logit_bias", _is_bias(self.logit_bias), "pairs of a token id and a number from -100 to 100"),
            ("min_tokens", _is_integer(self.min_tokens, 0), "an integer from 0 on"),
            ("stop_token_ids", all(_is_integer(token, 0) for token in self.stop_token_ids), "token ids from 0 on"),
            ("logprobs", self.logprobs is None or _is_integer(self.logprobs, 0, MAX_LOGPROBS), "null or 0 to 20"),
        ):
            if not fits:
                raise InputError(f"{name}={getattr(self, name)}: expected {expected}")
        if self.min_tokens > self.max_tokens:
            raise InputError(f"min_tokens={self.min_tokens}: expected at most max_tokens, {self.max_tokens}")

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on the tokens that came before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def changes_logits(self) -> bool:
        """Whether temperature, nucleus and seed alone do not say what is chosen."""
        return bool(self.top_k or self.min_p or self.logit_bias or self.min_tokens or self.has_penalties)

    def resolved(self, eos_token_ids: Iterable[int]) -> SamplingParameters:
        """With a seed that is a number, and with all tokens that end the sequence in ``stop_token_ids``."""
        seed = random.getrandbits(62) if self.seed is None else self.seed
        ends = self.stop_token_ids if self.ignore_eos else {*self.stop_token_ids, *eos_token_ids}
        return replace(self, seed=seed, stop_token_ids=tuple(sorted(ends)))

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> SamplingParameters:
        """Back from ``dataclasses.asdict`` after JSON, which knows no tuples."""
        bias = tuple((token, value) for token, value in fields["logit_bias"])
        return SamplingParameters(**{**fields, "logit_bias": bias, "stop_token_ids": tuple(fields["stop_token_ids"])})


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities, of the model's own distribution: before penalties, bias and temperature.

    Attributes:
        chosen: of the token that was generated, at least `LEAST_LOGPROB` as all of them.
        top: (token id, logarithm) of the most likely tokens, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request; the event that has a finish reason is the request's last.

    Attributes:
        token_id: the generated token, or None where the event carries none: a token that ends the sequence arrives as
            ``token_id=None, finish_reason="stop"``.
        finish_reason: None while the request goes on. ``"length"`` comes together with the last token.
        error: one line that says what went wrong, with ``finish_reason="error"``.
        logprobs: of the token, if the request asked for them.
        queued_s: with a request's first token: how long it waited for a place in the batch.
        cached_tokens: with a request's first token: how many of its prompt's tokens the cache held already.
    """

    token_id: int | None
    finish_reason: FinishReason | None
    error: str | None = None
    logprobs: TokenLogprobs | None = None
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
        prompt_tokens: of all admitted requests.
        prefix_hit_tokens: how many of these the cache held already.
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
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
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
            InputError: the prompt is empty or too long, or the model does not have one of its tokens.
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
