"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from runtime.server.answers import EventStream, answer
from runtime.server.context import ServerContext
from runtime.server.errors import bad_request
from runtime.server.generation import ReportedToken, TextDelta
from runtime.server.schemas import CompletionRequest
from runtime.server.token_texts import TokenTexts

DEFAULT_MAX_TOKENS = 16


class CompletionFormat:
    """Answers of ``/v1/completions``; see ``AnswerFormat``.

    Args:
        model_name: that answers name.
        token_texts: reports tokens with their log-probabilities; None reports none.
    """

    def __init__(self, model_name: str, token_texts: TokenTexts | None) -> None:
        self._token_texts = token_texts
        self._envelope: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def answer(self, choices: Sequence[TextDelta], usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        return self._envelope | {"choices": [self._choice(choice) for choice in choices], "usage": usage}

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return []

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return [self._envelope | {"choices": [self._choice(delta)]}]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        return self._envelope | {"choices": [], "usage": usage}

    def _choice(self, delta: TextDelta) -> dict[str, Any]:
        logprobs = None if self._token_texts is None else _logprobs(delta.tokens, self._token_texts)
        reason = delta.finish_reason
        return {"index": delta.choice, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(tokens: Sequence[ReportedToken], texts: TokenTexts) -> dict[str, Any]:
    """Lists by token; the likeliest tokens are keyed by their text, and the token itself is among them."""
    top: list[dict[str, float]] = []
    for token in tokens:
        by_text: dict[str, float] = {}
        for token_id, logprob in (*token.logprobs.top, (token.token_id, token.logprobs.chosen)):
            by_text.setdefault(texts.text_of(token_id, "bytes:"), logprob)
        top.append(by_text)
    return {
        "text_offset": [token.offset for token in tokens],
        "token_logprobs": [token.logprobs.chosen for token in tokens],
        "tokens": [texts.text_of(token.token_id, "bytes:") for token in tokens],
        "top_logprobs": top,
    }


def completions_router(context: ServerContext) -> APIRouter:
    """The route, for one served model."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        given = body.prompts()
        context.check(body, num_prompts=len(given))
        if body.best_of is not None and body.best_of != (body.n or 1):
            text = f"best_of {body.best_of} is not n, {body.n or 1}: all choices are returned; leave it out"
            raise bad_request(text, "best_of", "unsupported_parameter")
        prompts = [await context.encode_prompt(prompt) for prompt in given]
        generation = context.generate(body, prompts, body.max_tokens, DEFAULT_MAX_TOKENS)
        prompt_tokens = sum(map(len, prompts))
        reported = context.token_texts if body.num_logprobs is not None else None
        answer_format = CompletionFormat(context.model_name, reported)
        if not body.stream:
            return await answer(request, context.engine, generation, answer_format, prompt_tokens)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(context.engine, generation, answer_format, prompt_tokens, include_usage)

    return router
