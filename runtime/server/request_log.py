"""A line per request, with an id that the client can give and gets back; and logs as one JSON object per line.

Neither prompts nor answers nor keys are logged.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
_USABLE = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)  # what cannot break a line of the log
_current: ContextVar[str | None] = ContextVar("request_id", default=None)
_LONGEST_PATH = 200


class RequestLog:
    """ASGI middleware that gives every request an id and logs its end.

    Requests that change nothing and succeed, such as a probe's or a page's polling, are logged as debugging.

    Args:
        app: answers.
        count: told the route's pattern and the status of every request.
    """

    def __init__(self, app: ASGIApp, count: Callable[[str, str], None]) -> None:
        self.app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and the id with the response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _USABLE.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (REQUEST_ID.lower().encode(), request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        # For the answer to an unexpected error, which is made outside of this middleware.
        scope.setdefault("state", {})["request_id"] = request_id
        token = _current.set(request_id)
        start_s = time.perf_counter()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            status = status or 500
            raise
        finally:
            self._count(getattr(scope.get("route"), "path", "other"), str(status) if status else "none")
            _log_end(scope, status, time.perf_counter() - start_s)
            _current.reset(token)


def _log_end(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """One line: what was asked, what was answered (0: nothing), and how long it took."""
    quiet = scope["method"] in ("GET", "HEAD", "OPTIONS") and status < 400
    # Escaped, so that a path with a line break stays one line; without the query, which is not ours to keep.
    path = scope["path"][:_LONGEST_PATH].encode("unicode_escape").decode()
    facts = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4)}
    level = logging.DEBUG if quiet else logging.INFO
    logger.log(level, "%s %s %d in %.3f s", scope["method"], path, status, seconds, extra={"facts": facts})


class RequestIdFilter(logging.Filter):
    """Adds the id of the request under way to every record, as ``request_id`` (None outside of requests)."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        record.request_id = _current.get()
        return True


class TextFormatter(logging.Formatter):
    """The text format given, with the id of the request at the end of its lines."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback where there is one."""
        text = super().format(record)
        request_id = getattr(record, "request_id", None)
        return text if request_id is None else f"{text} [{request_id}]"


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message, and what the record says besides."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", None)
        if request_id is not None:
            entry["request_id"] = request_id
        entry |= getattr(record, "facts", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logs(log_format: str) -> None:
    """Give the process's handlers the request ids, and the format that was asked for: ``text`` or ``json``."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(RequestIdFilter())
        if log_format == "json":
            handler.setFormatter(JsonFormatter())
        else:
            pattern = handler.formatter._fmt if handler.formatter is not None else None
            handler.setFormatter(TextFormatter(pattern))
