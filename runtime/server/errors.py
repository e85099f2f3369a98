"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from profiler.errors import InputError
from runtime.requests import EngineError, QueueFull

INVALID_REQUEST = "invalid_request_error"
RATE_LIMIT = "rate_limit_error"
SERVER_ERROR = "server_error"

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 80


class ApiError(HTTPException):
    """An error that is answered in OpenAI's shape.

    Args:
        status_code: HTTP status.
        message: one line: what was given, what is expected, the remedy.
        param: the request's field at fault, if one is.
        code: a word for programs, such as ``model_not_found``.
        headers: of the response.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status_code, detail=message, headers=headers)
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        """OpenAI's error type for the status."""
        if self.status_code == 429:
            return RATE_LIMIT
        return INVALID_REQUEST if self.status_code < 500 else SERVER_ERROR

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request is at fault."""
    return ApiError(400, message, param=param, code=code)


def error_response(error: ApiError) -> Response:
    """The HTTP response for an error."""
    # ASCII escapes: a message may quote a lone surrogate, which UTF-8 cannot carry.
    content = json.dumps(error.body())
    return Response(content, error.status_code, headers=error.headers, media_type="application/json")


def quote(value: object) -> str:
    """A value as it was given, shortened to fit one line of a message."""
    return _shortener.repr(value)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of ``app`` in OpenAI's shape."""
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(EngineError, _answer_engine_error)
    app.add_exception_handler(InputError, _answer_input_error)
    app.add_exception_handler(Exception, _answer_unexpected_error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error)
    route = f"{request.method} {request.url.path}"
    message = {
        404: f"no route {route}; see /openapi.json for the routes there are",
        405: f"{route}: method not allowed; see /openapi.json for the methods of each route",
    }.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _answer_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_describe(error.errors()))


async def _answer_engine_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, QueueFull):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return error_response(ApiError(429, str(error), code="queue_full", headers=headers))
    return error_response(ApiError(503, f"the engine is down: {error}", code="engine_down"))


async def _answer_input_error(_request: Request, error: Exception) -> Response:
    return error_response(bad_request(str(error)))


async def _answer_unexpected_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this answer, so uvicorn logs it with its traceback.
    request_id = request.scope.get("state", {}).get("request_id")
    headers = {"Connection": "close"}  # uvicorn closes it, and a client that sent another request would lose that
    headers |= {} if request_id is None else {"X-Request-Id": request_id}
    text = f"internal error ({type(error).__name__}); see the server's log"
    return error_response(ApiError(500, text, headers=headers))


def _describe(errors: Sequence[Any]) -> ApiError:
    """One line for the first thing that pydantic found wrong with a body."""
    error = errors[0]
    kind, location = error["type"], [str(part) for part in error["loc"] if part != "body"]
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "malformed")
        return bad_request(f"the body is not JSON ({reason} at character {error['loc'][-1]}); send one JSON object")
    if not location:
        return bad_request("the body must be one JSON object; send it with the header Content-Type: application/json")
    param = ".".join(location)
    if kind == "missing":
        return bad_request(f"{param} is missing; the request needs it", param)
    cause = error.get("ctx", {}).get("error")
    # A validator of ours says the whole line itself; pydantic's messages lack the value.
    if isinstance(cause, ValueError):
        return bad_request(f"{param}: {cause}", param)
    expected = error["msg"].removeprefix("Input should be ")
    return bad_request(f"{param}: expected {expected}, got {quote(error['input'])}", param)
