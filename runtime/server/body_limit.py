"""Limits on request bodies, with and without a declared length: how large they are, and how long they take to come."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import ApiError, error_response

MAX_BODY_BYTES = 4 << 20
# A client that is still sending would not read the answer, so what follows the limit is read and dropped, up to this.
MAX_DROPPED_BYTES = 16 * MAX_BODY_BYTES
MAX_BODY_S = 60


class BodyLimit:
    """ASGI middleware that reads bodies whole before the application sees them.

    Answers 413 to a body of more than ``max_bytes``, holding no more than that in memory, and 408 to one that takes
    longer than ``max_seconds``. A request whose client goes away before its body has come is dropped.

    Args:
        app: sees whole requests only.
        max_bytes: of a body.
        max_seconds: for it to come.
        reading: holds the deadlines of all bodies that are being read, so that a server that stops can bring them
            forward.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int = MAX_BODY_BYTES,
        max_seconds: float = MAX_BODY_S,
        reading: set[asyncio.Timeout] | None = None,
    ) -> None:
        self.app = app
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        self._reading = set() if reading is None else reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then hand it to the application or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.max_seconds) as deadline:
                self._reading.add(deadline)
                try:
                    messages = await self._read(receive)
                finally:
                    self._reading.discard(deadline)
        except TimeoutError:
            text = f"the body did not come in time, within {self.max_seconds:g} s or before the server stops"
            error = ApiError(408, text, code="request_timeout", headers={"Connection": "close"})
            await error_response(error)(scope, receive, send)
            return
        except _TooLargeError:
            text = f"the body has more than {self.max_bytes} bytes, the limit; send a shorter request"
            await error_response(ApiError(413, text, code="request_too_large"))(scope, receive, send)
            return
        if messages[-1]["type"] == "http.disconnect":
            return
        waiting = iter(messages)

        async def replay() -> Message:
            message = next(waiting, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> list[Message]:
        messages: list[Message] = []
        size = 0
        while size <= MAX_DROPPED_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if size <= self.max_bytes:
                messages.append(message)
            if not message.get("more_body", False):
                break
        if size > self.max_bytes:
            raise _TooLargeError
        return messages


class _TooLargeError(Exception):
    """The body has more bytes than are taken."""
