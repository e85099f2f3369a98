"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from runtime.server.answers import EventStream, answer
from runtime.server.context import ServerContext
from runtime.server.generation import TextDelta
from runtime.server.schemas import CompletionRequest

DEFAULT_MAX_TOKENS = 16


class CompletionFormat:
    """Answers of ``/v1/completions``; see ``AnswerFormat``."""

    def __init__(self, model_name: str) -> None:
        self._envelope: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    def answer(self, texts: list[str], finish_reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        pairs = enumerate(zip(texts, finish_reasons, strict=True))
        choices = [_choice(index, text, reason) for index, (text, reason) in pairs]
        return self._envelope | {"choices": choices, "usage": usage}

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return []

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return [self._envelope | {"choices": [_choice(delta.choice, delta.text, delta.finish_reason)]}]

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        return self._envelope | {"choices": [], "usage": usage}


def _choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def completions_router(context: ServerContext) -> APIRouter:
    """The route, for one served model."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts."""
        given = body.prompts()
        context.check(body, num_prompts=len(given))
        prompts = [await context.encode_prompt(prompt) for prompt in given]
        generation = context.generate(body, prompts, body.max_tokens, DEFAULT_MAX_TOKENS)
        prompt_tokens = sum(map(len, prompts))
        answer_format = CompletionFormat(context.model_name)
        if not body.stream:
            return await answer(request, context.engine, generation, answer_format, prompt_tokens)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(context.engine, generation, answer_format, prompt_tokens, include_usage)

    return router
