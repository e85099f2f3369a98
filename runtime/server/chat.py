"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response

from runtime.server.answers import EventStream, answer
from runtime.server.context import ServerContext
from runtime.server.errors import bad_request
from runtime.server.generation import TextDelta
from runtime.server.schemas import ChatCompletionRequest


class ChatFormat:
    """Answers of ``/v1/chat/completions``; see ``AnswerFormat``."""

    def __init__(self, model_name: str) -> None:
        self._identity: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}"}
        self._facts: dict[str, Any] = {"created": int(time.time()), "model": model_name}

    def answer(self, texts: list[str], finish_reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for index, (text, reason) in enumerate(zip(texts, finish_reasons, strict=True))
        ]
        return self._identity | {"object": "chat.completion"} | self._facts | {"choices": choices, "usage": usage}

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None) for index in range(num_choices)]

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """See ``AnswerFormat``: the text and the end are said apart."""
        text = [self._chunk(delta.choice, {"content": delta.text}, None)] if delta.text else []
        end = [self._chunk(delta.choice, {}, delta.finish_reason)] if delta.finish_reason else []
        return text + end

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        return self._envelope([]) | {"usage": usage}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return self._envelope([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._identity | {"object": "chat.completion.chunk"} | self._facts | {"choices": choices}


def chat_router(context: ServerContext) -> APIRouter:
    """The route, for one served model."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
        """Answer a conversation."""
        context.check(body, num_prompts=1)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise bad_request("max_tokens and max_completion_tokens mean the same; give one", "max_tokens")
        prompt = await context.encode_chat(body.messages)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        generation = context.generate(body, [prompt], max_tokens, default_tokens=None)
        answer_format = ChatFormat(context.model_name)
        if not body.stream:
            return await answer(request, context.engine, generation, answer_format, len(prompt))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(context.engine, generation, answer_format, len(prompt), include_usage)

    return router
