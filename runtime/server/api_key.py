"""An API key that requests must bring: ``Authorization: Bearer KEY``."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.server.errors import ApiError, error_response

# What answers about the model or with it. Probes, metrics and the page's own files are open, as elsewhere.
GUARDED = ("/v1/", "/tokenize", "/detokenize", "/compare")
SCHEME = "bearer"


class ApiKeyGuard:
    """ASGI middleware that answers 401 to guarded requests without the key, before their body is read."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self.app = app
        self._key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or refuse it."""
        if scope["type"] == "http" and is_guarded(scope["path"]):
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # In constant time, so that a key cannot be guessed letter by letter.
            if scheme.lower() != SCHEME or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                reason = "wrong API key" if given else "no API key"
                text = f"{reason}; send the header Authorization: Bearer KEY with the key this server was started with"
                headers = {"WWW-Authenticate": "Bearer"}
                error = ApiError(401, text, code="invalid_api_key", headers=headers)
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def is_guarded(path: str) -> bool:
    """Whether requests for a path must bring the key."""
    return path.startswith(GUARDED)
