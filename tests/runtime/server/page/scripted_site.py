"""The page over a server that answers what a test tells it to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from runtime.server import bind_socket
from runtime.server.errors import ApiError, error_response, install_error_handlers
from runtime.server.listener import socket_url
from runtime.server.page import page_router

# 3 layers, 2 GPUs; expert 0 has a copy on each GPU in layer 4.
SLOTS = [[[0, 1], [2, 3]], [[0, 1, 2], [0, 3]], [[3, 2], [1, 0]]]
PLACEMENT: dict[str, Any] = {
    "model": "team/demo",
    "strategy": "step_time",
    "layer_ids": [3, 4, 5],
    "num_experts": 4,
    "top_k": 2,
    "gpus": 2,
    "slots": SLOTS,
    "dispatch": {"rule": "level", "split_above_tokens": None},
    "predicted": {"step_us": {"plan": {"1": 400.0, "8": 900.0}, "contiguous": {"1": 600.0, "8": 1080.0}}},
    "copy_of": None,
}
LOAD: dict[str, Any] = {
    "steps": 128,
    "step_ms": {"median": 1.25, "p95": 2.5},
    "predicted_step_us": 400.0,
    "tokens_per_s": 321.4,
    "running": 3,
    "waiting": 1,
    "tokens": [[[30, 30], [20, 20]], [[10, 20, 20], [40, 10]], [[5, 5], [5, 5]]],
    "active": [[2.0, 1.5], [2.5, 1.25], [1.0, 1.0]],
    "balancedness": [0.83, 1.0, 1.0],
}
#: A piece of text, a failure in the middle, or something to wait for.
Piece = str | Exception | threading.Event


class ScriptedSite:
    """A server on a free port, in a thread. Attributes may be changed while it runs.

    Attributes:
        pieces: of every answer.
        key: what requests must carry, if anything.
        full: answer 429.
        has_template: without one, chats are refused as the real server does.
        seen: path and body of every prompt.
        headers: of the last prompt.
        left: set when a client leaves before its answer ends.
    """

    def __init__(self, compare_url: str | None = None, strategy: str = "step_time") -> None:
        self._strategy = strategy
        self.reset()
        self._socket = bind_socket("127.0.0.1", 0)
        self.url = socket_url(self._socket)
        app = FastAPI(openapi_url=None)
        app.include_router(page_router(compare_url))
        install_error_handlers(app)
        self._add_routes(app)
        self._app = app
        self._start()

    def reset(self) -> None:
        """As at the beginning."""
        self.pieces: list[Piece] = ["Hello", ", ", "world."]
        self.placement = PLACEMENT | {"strategy": self._strategy}
        self.load = LOAD
        self.key: str | None = None
        self.full = False
        self.has_template = True
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.headers: dict[str, str] = {}
        self.polls = 0
        self.left = threading.Event()

    def stop(self) -> None:
        """Close everything, as when the process dies."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def restart(self) -> None:
        """Serve again on the same port."""
        self._socket = bind_socket("127.0.0.1", int(self.url.rpartition(":")[2]))
        self._start()

    def _start(self) -> None:
        self._socket.listen()
        self._server = uvicorn.Server(uvicorn.Config(self._app, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def _add_routes(self, app: FastAPI) -> None:
        @app.middleware("http")
        async def check_key(request: Request, go_on: Any) -> Response:
            if self.key and "v1" in request.url.path and request.headers.get("authorization") != f"Bearer {self.key}":
                return error_response(ApiError(401, "wrong or missing API key", code="invalid_api_key"))
            return await go_on(request)

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [{"id": self.placement["model"], "object": "model"}]}

        @app.get("/v1/placement")
        async def placement() -> Any:
            return self.placement

        @app.get("/v1/placement/load")
        async def load() -> Any:
            self.polls += 1
            return self.load

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            if not self.has_template:
                raise ApiError(400, "no chat template; use /v1/completions", code="no_chat_template")
            return await self._answer(request, lambda text: {"delta": {"content": text}})

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            return await self._answer(request, lambda text: {"text": text})

    async def _answer(self, request: Request, choice: Any) -> Response:
        self.seen.append((request.url.path, await request.json()))
        self.headers = dict(request.headers)
        if self.seen[-1][1]["model"] != self.placement["model"]:
            raise ApiError(404, "the model does not exist here", code="model_not_found")
        if self.full:
            error = ApiError(429, "8 requests wait", code="queue_full", headers={"Retry-After": "7"})
            return error_response(error)
        return StreamingResponse(self._events(choice), media_type="text/event-stream")

    async def _events(self, choice: Any) -> AsyncIterator[str]:
        sent = 0
        complete = False
        try:
            for piece in self.pieces:
                if isinstance(piece, threading.Event):
                    while not piece.is_set():
                        await asyncio.sleep(0.01)
                elif isinstance(piece, Exception):
                    yield _event(ApiError(500, str(piece)).body())
                    complete = True
                    return
                else:
                    sent += 1
                    yield _event({"choices": [choice(piece) | {"index": 0, "finish_reason": None}], "usage": None})
            yield _event({"choices": [choice("") | {"index": 0, "finish_reason": "stop"}], "usage": None})
            yield _event({"choices": [], "usage": {"completion_tokens": sent}})
            yield "data: [DONE]\n\n"
            complete = True
        finally:
            if not complete:
                self.left.set()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
