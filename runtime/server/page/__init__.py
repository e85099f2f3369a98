"""The page at ``/``: a chat, the placement at work, and a second server beside it; plain files, no build step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response

from runtime.server.errors import ApiError, quote
from runtime.server.page.second_server import Forwarded, second_server_router

_FOLDER = Path(__file__).parent / "files"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    # Nothing from elsewhere, no inline script or style: what a model writes cannot become code.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A newer version of the project serves newer files under the same names.
    "Cache-Control": "no-cache",
}


def page_router(compare_url: str | None, track: Callable[[Forwarded], None]) -> APIRouter:
    """The page, its files, and under ``/compare`` the second server.

    Args:
        compare_url: of a second server that the page may ask the same prompt; None where there is none.
        track: told of every answer of the second server, so that it ends where this server does.
    """
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}

    @router.get("/")
    async def page() -> Response:
        """The page itself."""
        return Response(files["page.html"], media_type="text/html", headers=_HEADERS)

    @router.get("/page/settings")
    async def settings() -> dict[str, Any]:
        """What the page must know before it asks for anything else."""
        return {"compare": compare_url is not None}

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        """A style sheet or a script of the page."""
        if name not in files:
            raise ApiError(404, f"the page has no file {quote(name)}; open /")
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)

    router.include_router(second_server_router(compare_url, track))
    return router
