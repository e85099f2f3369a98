"""Bodies of requests, as far as they are supported; types are strict, unknown fields are kept and judged apart."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from runtime.requests import MAX_LOGPROBS, REPETITION_PENALTIES
from runtime.server.errors import quote

MAX_STOP_STRINGS = 4
MAX_STOP_TOKENS = 128
MAX_BIASED_TOKENS = 300
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**63)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Prompt = str | list[int]


def _check_prompt(value: Any) -> Any:
    """Accept a string, a list of token ids, or a non-empty list of either."""
    expected = "a string, a list of token ids, or a list of those that is not empty"
    prompts = value if isinstance(value, list) and not _is_token_ids(value) else [value]
    if not prompts or not all(isinstance(prompt, str) or _is_token_ids(prompt) for prompt in prompts):
        raise ValueError(f"expected {expected}, got {quote(value)}")
    for prompt in prompts:
        if isinstance(prompt, str):
            check_unicode(prompt)
    return value


def check_unicode(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can carry and no tokenizer takes."""
    text.encode()  # UnicodeEncodeError is a ValueError that names the character and its position
    return text


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_stop(value: Any) -> Any:
    """Accept one string or up to four, none empty."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError(f"expected a string or a list of strings, none empty, got {quote(value)}")
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"expected at most {MAX_STOP_STRINGS} stop strings, got {len(stops)}")
    return stops


def _check_logit_bias(value: Any) -> Any:
    """Turn token ids, which are strings as JSON's keys always are, into numbers."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASED_TOKENS:
        raise ValueError(f"expected an object of at most {MAX_BIASED_TOKENS} token ids, got {quote(value)}")
    for token, bias in value.items():
        if not re.fullmatch("0|[1-9][0-9]{0,17}", token):
            raise ValueError(f"expected token ids as keys, got {quote(token)}")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"expected a number from -100 to 100 for token {token}, got {quote(bias)}")
    return {int(token): bias for token, bias in value.items()}


def _join_text_parts(value: Any) -> Any:
    """Turn a message's list of ``{"type": "text", "text": …}`` into one string."""
    if isinstance(value, str):
        return check_unicode(value)
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected text or parts of type 'text', got {quote(part)}; only text is supported")
        texts.append(part["text"])
    return check_unicode("\n".join(texts))


class Schema(BaseModel):
    """Base of all request bodies."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Schema):
    """Options of a stream."""

    include_usage: bool = False


class GenerationRequest(Schema):
    """What both kinds of request have in common; a field that is null has its default."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None)] = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        BeforeValidator(
            _check_logit_bias,
            json_schema_input_type=dict[Annotated[str, StringConstraints(pattern="^(0|[1-9][0-9]*)$")], Bias] | None,
        ),
    ] = None
    user: str | None = None
    # What follows is not OpenAI's; names and meanings are those of other servers.
    top_k: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: (
        Annotated[float, Field(ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1], allow_inf_nan=False)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report with each token; None reports nothing."""


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: Annotated[str | list[int] | list[str | list[int]], BeforeValidator(_check_prompt)]
    logprobs: NumLogprobs | None = None
    best_of: Count | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return self.logprobs

    def prompts(self) -> list[Prompt]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        token_ids = [item for item in self.prompt if isinstance(item, int)]
        return [token_ids] if token_ids else [item for item in self.prompt if not isinstance(item, int)]


class ChatMessage(Schema):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_text_parts, json_schema_input_type=str | list[dict[str, str]])]


class ChatCompletionRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None

    @property
    def num_logprobs(self) -> int | None:
        """See ``GenerationRequest``."""
        return (self.top_logprobs or 0) if self.logprobs else None
