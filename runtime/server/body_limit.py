"""A limit on the size of request bodies, for bodies with and without a declared length."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.errors import ApiError, error_response

MAX_BODY_BYTES = 4 << 20
# A client that is still sending would not read the answer, so what follows the limit is read and dropped, up to this.
MAX_DROPPED_BYTES = 16 * MAX_BODY_BYTES


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than ``max_bytes``, holding no more than that in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then hand it to the application or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
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
            text = f"the body has more than {self.max_bytes} bytes, the limit; send a shorter request"
            await error_response(ApiError(413, text, code="request_too_large"))(scope, receive, send)
            return
        waiting = iter(messages)

        async def replay() -> Message:
            message = next(waiting, None)
            return message if message is not None else await receive()

        await self.app(scope, replay, send)
