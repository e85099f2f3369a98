"""From a generation to an HTTP answer: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from runtime.requests import EngineProtocol
from runtime.server.errors import ApiError
from runtime.server.generation import ClientDisconnected, Generation, GenerationError, TextDelta

# nginx's code for it; nobody receives the answer.
CLIENT_CLOSED_REQUEST = 499


class AnswerFormat(Protocol):
    """How one endpoint writes its answers, as JSON objects."""

    def answer(self, choices: Sequence[TextDelta], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer, from every choice's whole text."""
        ...

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with."""
        ...

    def chunks(self, delta: TextDelta) -> list[dict[str, Any]]:
        """What a stream says about one piece of text."""
        ...

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The end of a stream that was asked for its usage."""
        ...


async def answer(
    request: Request,
    engine: EngineProtocol,
    generation: Generation,
    answer_format: AnswerFormat,
    prompt_tokens: int,
) -> Response:
    """Wait for all choices and answer with one JSON object.

    Raises:
        ApiError: 500 or 503, if the engine fails.
    """
    parts: list[list[TextDelta]] = [[] for _ in range(generation.num_choices)]
    try:
        async with aclosing(generation.deltas(request.receive)) as deltas:
            async for delta in deltas:
                parts[delta.choice].append(delta)
    except ClientDisconnected:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except GenerationError as error:
        raise _server_error(engine, error) from error
    finally:
        generation.close()
    content = answer_format.answer([_whole(pieces) for pieces in parts], usage(prompt_tokens, generation.num_tokens))
    return Response(_encode(content), media_type="application/json")


def _whole(pieces: Sequence[TextDelta]) -> TextDelta:
    """One choice's pieces as one; the last has the finish reason."""
    text = "".join(piece.text for piece in pieces)
    return replace(pieces[-1], text=text, tokens=[token for piece in pieces for token in piece.tokens])


class EventStream(Response):
    """Streams a generation as server-sent events, and ends it whatever happens to the connection."""

    def __init__(
        self,
        engine: EngineProtocol,
        generation: Generation,
        answer_format: AnswerFormat,
        prompt_tokens: int,
        include_usage: bool,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        # The base class announces the length of its empty body.
        del self.headers["content-length"]
        self._engine = engine
        self._generation = generation
        self._format = answer_format
        self._prompt_tokens = prompt_tokens
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._events(receive)) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientDisconnected:
            return
        finally:
            self._generation.close()

    async def _events(self, receive: Receive) -> AsyncGenerator[bytes]:
        for chunk in self._format.opening_chunks(self._generation.num_choices):
            yield self._chunk(chunk)
        try:
            async with aclosing(self._generation.deltas(receive)) as deltas:
                async for delta in deltas:
                    for chunk in self._format.chunks(delta):
                        yield self._chunk(chunk)
        except GenerationError as error:
            # The stream ends without [DONE]: the answer is not complete.
            yield _encode(_server_error(self._engine, error).body())
            return
        if self._include_usage:
            yield _encode(self._format.usage_chunk(usage(self._prompt_tokens, self._generation.num_tokens)))
        yield b"[DONE]"

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        return _encode(chunk | {"usage": None} if self._include_usage else chunk)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts in OpenAI's shape."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _encode(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _server_error(engine: EngineProtocol, error: GenerationError) -> ApiError:
    status = 500 if engine.status().ready else 503
    return ApiError(status, f"the generation failed: {error}", code="generation_failed")
