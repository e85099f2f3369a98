"""The OpenAPI document, as the server really answers: its errors, its streams, its key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from runtime.server.api_key import is_guarded
from runtime.server.parameters import HARMLESS, NEUTRAL

GENERATING = ("/v1/completions", "/v1/chat/completions")
NAMES_MODEL = (*GENERATING, "/tokenize", "/detokenize", "/v1/models/{model_id}")

_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
_GENERATED = {
    "title": "Generated",
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage"],
    "properties": {
        "id": {"type": "string"},
        "object": {"type": "string"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["index", "finish_reason"],
                "properties": {"index": {"type": "integer"}, "finish_reason": {"type": "string"}},
            },
        },
        "usage": {
            "type": "object",
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
            "additionalProperties": True,
        },
    },
}
_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}}


def install_openapi(app: FastAPI, guarded: bool) -> None:
    """Let ``/openapi.json`` describe every answer.

    Args:
        app: with all its routes.
        guarded: whether requests must bring an API key.
    """

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _correct(document, guarded)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's way to change the document


def _correct(document: dict[str, Any], guarded: bool) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # we answer 400, in OpenAI's shape
        schemas.pop(name, None)
    for schema in schemas.values():
        if schema.get("additionalProperties") is True:
            _describe_unsupported(schema)
    schemas |= {"Error": _ERROR, "Generated": _GENERATED}
    if guarded:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            responses.pop("422", None)
            responses |= _errors_of(path, method)
            if path in GENERATING:
                responses["200"] = _generated_response()
            if guarded and is_guarded(path):
                operation["security"] = [{"key": []}]
                responses["401"] = _error_response("The API key is missing or wrong")


def _describe_unsupported(schema: dict[str, Any]) -> None:
    """Say of a body which parameters are accepted without being used, as `refuse_unsupported` judges them."""
    known = schema["properties"]
    for name in sorted(HARMLESS - known.keys()):
        known[name] = {"description": "accepted and not used"}
    for name in sorted(NEUTRAL.keys() - known.keys()):
        known[name] = {"description": "not supported; these values ask for nothing", "enum": [None, *NEUTRAL[name]]}
    schema["additionalProperties"] = {"type": "null"}


def _errors_of(path: str, method: str) -> dict[str, Any]:
    errors = {"500": _error_response("The server failed")}
    if method == "post":
        errors["400"] = _error_response("The request is at fault; the message says how")
        errors["408"] = _error_response("The body took too long to come")
        errors["413"] = _error_response("The body is larger than the server takes")
    if path in NAMES_MODEL:
        errors["404"] = _error_response("There is no such model here")
    if path in GENERATING:
        errors["429"] = _error_response("Too many requests wait") | {"headers": _RETRY_AFTER}
    if path in (*GENERATING, "/health"):
        errors["503"] = _error_response("The server is starting, stopping or has failed")
    return errors


def _error_response(description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": description, "content": content}


def _generated_response() -> dict[str, Any]:
    return {
        "description": "The answer; with stream=true as server-sent events, of which each is such an object in pieces",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Generated"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
