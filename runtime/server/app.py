"""The application: all routes of one served model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI

from runtime.requests import EngineProtocol
from runtime.server.body_limit import BodyLimit
from runtime.server.chat import chat_router
from runtime.server.completions import completions_router
from runtime.server.context import ServerContext
from runtime.server.errors import ApiError, install_error_handlers
from runtime.server.page import page_router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def create_app(
    engine: EngineProtocol,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    created: int,
    compare_url: str | None = None,
) -> FastAPI:
    """The OpenAI-compatible application for one model.

    Args:
        engine: takes tokens, gives tokens; may become ready later (``/health`` says so).
        tokenizer: the model's own; chat needs its chat template.
        model_name: the name that requests must give, if they give one.
        created: Unix time in s that ``/v1/models`` reports.
        compare_url: of a second server, which the page at ``/`` asks beside this one.

    Source: the routes and shapes of OpenAI's API reference (completions, chat completions, models).
    """
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="expertplan", docs_url=None, redoc_url=None)
    context = ServerContext(engine, tokenizer, model_name, created)
    # The process that serves the application ends generations through it.
    app.state.context = context
    app.include_router(completions_router(context))
    app.include_router(chat_router(context))
    app.include_router(_facts_router(context))
    app.include_router(page_router(compare_url))
    app.add_middleware(BodyLimit)
    install_error_handlers(app)
    return app


def _facts_router(context: ServerContext) -> APIRouter:
    """The routes that generate nothing."""
    router = APIRouter()
    model = {"id": context.model_name, "object": "model", "created": context.created, "owned_by": "expertplan"}

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are taken; 503 while they are not."""
        status = context.engine.status()
        if not status.ready:
            raise ApiError(503, status.failure or "the engine is not ready yet", code="not_ready")
        return {"status": "ok"}

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """The served model; hub ids contain a slash."""
        context.check_model(model_id)
        return model

    return router
