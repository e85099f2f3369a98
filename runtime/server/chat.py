"""``POST /v1/chat/completions``."""

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
from runtime.server.schemas import ChatCompletionRequest
from runtime.server.token_texts import TokenTexts


class ChatFormat:
    """Answers of ``/v1/chat/completions``; see ``AnswerFormat``.

    Args:
        model_name: that answers name.
        token_texts: reports tokens with their log-probabilities; None reports none.
    """

    def __init__(self, model_name: str, token_texts: TokenTexts | None) -> None:
        self._token_texts = token_texts
        self._identity: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}"}
        self._facts: dict[str, Any] = {"created": int(time.time()), "model": model_name}

    def answer(self, choices: Sequence[TextDelta], usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        described = [
            {
                "index": choice.choice,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.tokens),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._identity | {"object": "chat.completion"} | self._facts | {"choices": described, "usage": usage}

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """See ``AnswerFormat``."""
        return [self._chunk(index, {"role": "assistant", "content": ""}, None) for index in range(num_choices)]

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """See ``AnswerFormat``: the text and the end are said apart."""
        text, end = [], []
        if delta.text or delta.tokens:
            text = [self._chunk(delta.choice, {"content": delta.text}, None, self._logprobs(delta.tokens))]
        if delta.finish_reason:
            end = [self._chunk(delta.choice, {}, delta.finish_reason)]
        return text + end

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """See ``AnswerFormat``."""
        return self._envelope([]) | {"usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, str], finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self._envelope([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}])

    def _logprobs(self, tokens: Sequence[ReportedToken]) -> dict[str, Any] | None:
        if self._token_texts is None:
            return None
        content = [
            self._described(token.token_id, token.logprobs.chosen)
            | {"top_logprobs": [self._described(token_id, value) for token_id, value in token.logprobs.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        assert self._token_texts is not None
        text, data = self._token_texts.text_of(token_id), self._token_texts.bytes_of(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

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
        if body.top_logprobs and not body.logprobs:
            raise bad_request(f"top_logprobs {body.top_logprobs} needs logprobs; set that to true", "top_logprobs")
        prompt = await context.encode_chat(body.messages)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        generation = context.generate(body, [prompt], max_tokens, default_tokens=None)
        answer_format = ChatFormat(context.model_name, context.token_texts if body.logprobs else None)
        if not body.stream:
            return await answer(request, context.engine, generation, answer_format, len(prompt))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(context.engine, generation, answer_format, len(prompt), include_usage)

    return router
