"""A second server behind this one: the page asks it through ``/compare``, so that browsers need no permission for it.

Only the server that the settings name, and only the routes that the page uses: this is no open proxy.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import APIRouter, Request, Response
from starlette.types import Receive, Scope, Send

from runtime.server.errors import ApiError, error_response

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
READABLE = ("v1/models", "v1/placement", "v1/placement/load")
WRITABLE = ("v1/completions", "v1/chat/completions")
# The key is this server's: both are started with the same one.
REQUEST_HEADERS = ("accept", "authorization", "content-type")
RESPONSE_HEADERS = ("content-type", "retry-after")


def second_server_router(url: str | None, track: Callable[[Forwarded], None]) -> APIRouter:
    """The routes under ``/compare``.

    Args:
        url: of the second server, without a slash at the end; None answers 404 to everything.
        track: told of every answer.
    """
    router = APIRouter(prefix="/compare", include_in_schema=False)

    def forwarder(path: str) -> Callable[[Request], Awaitable[Response]]:
        async def forward(request: Request) -> Response:
            if url is None:
                text = "this server knows no second one; start it with compare_url=http://HOST:PORT"
                raise ApiError(404, text, code="no_second_server")
            # As bytes, since HTTP allows more than ASCII; the first of each, which is the one that this server judged.
            given = [name for name in REQUEST_HEADERS if name in request.headers]
            headers = {name.encode(): request.headers[name].encode("latin-1") for name in given}
            body = await request.body()
            forwarded = Forwarded(httpx.Request(request.method, f"{url}/{path}", headers=headers, content=body))
            track(forwarded)
            return forwarded

        return forward

    for paths, method in ((READABLE, "GET"), (WRITABLE, "POST")):
        for path in paths:
            router.add_api_route(f"/{path}", forwarder(path), methods=[method])
    return router


class Forwarded(Response):
    """Another server's answer, piece by piece as it comes; a client that leaves ends the request there too."""

    def __init__(self, request: httpx.Request) -> None:
        super().__init__()
        self._request = request
        self._started = False
        self._aborted: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def abort(self, reason: str) -> None:
        """End the answer by an error that says ``reason``."""
        if not self._aborted.done():
            self._aborted.set_result(reason)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and send what comes: 502 where nothing does."""
        forward = asyncio.create_task(self._forward(scope, receive, send))
        leaves = asyncio.create_task(_client_leaves(receive))
        try:
            waited: tuple[asyncio.Future[Any], ...] = (forward, leaves, self._aborted)
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            complete, left = forward.done(), leaves.done()
        finally:
            for task in (forward, leaves):
                task.cancel()
            await asyncio.gather(forward, leaves, return_exceptions=True)
        if complete:
            forward.result()
        elif not left:
            await self._fail(ApiError(503, self._aborted.result(), code="server_stopping"), scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # no proxy: the operator named the server itself
            verify=self._request.url.scheme == "https",  # reading certificates takes long, and http has none
        )
        try:
            async with client:
                answer = await client.send(self._request, stream=True)
                kept = [name for name in RESPONSE_HEADERS if name in answer.headers]
                headers = [(name.encode(), answer.headers[name].encode()) for name in kept]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
                self._started = True
                async for piece in answer.aiter_bytes():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.HTTPError as error:
            # Where it listens is the operator's business, not the page's.
            logger.warning("the second server at %s: %s", self._request.url, error or type(error).__name__)
            text = "the second server does not answer; start it, or correct compare_url"
            if self._started:
                text = "the second server broke off"
            await self._fail(ApiError(502, text, code="second_server_down"), scope, receive, send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with an error, or end by its event what is being streamed."""
        if not self._started:
            await error_response(error)(scope, receive, send)
            return
        event = b"\n\ndata: " + json.dumps(error.body()).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": False})


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
