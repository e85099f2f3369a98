"""The application: all routes of one served model, and what every request passes on its way to them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from runtime.requests import EngineProtocol
from runtime.server.api_key import ApiKeyGuard
from runtime.server.body_limit import BodyLimit
from runtime.server.chat import chat_router
from runtime.server.completions import completions_router
from runtime.server.context import ServerContext
from runtime.server.errors import install_error_handlers
from runtime.server.facts import facts_router
from runtime.server.metered_engine import MeteredEngine
from runtime.server.metrics import Metrics, metrics_router
from runtime.server.openapi import install_openapi
from runtime.server.page import page_router
from runtime.server.placement import Placement, placement_router
from runtime.server.request_log import REQUEST_ID, RequestLog
from runtime.server.tokenization import tokenization_router

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def create_app(
    engine: EngineProtocol,
    tokenizer: PreTrainedTokenizerBase,
    model_name: str,
    created: int,
    placement: Placement | None = None,
    *,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    compare_url: str | None = None,
) -> FastAPI:
    """The OpenAI-compatible application for one model.

    Args:
        engine: takes tokens, gives tokens; may become ready later (``/health`` says so).
        tokenizer: the model's own; chat needs its chat template.
        model_name: the name that requests must give, if they give one.
        created: Unix time in s that ``/v1/models`` reports.
        placement: what is served, and how it goes; None leaves the routes and metrics about it out.
        api_key: that guarded requests must bring; None serves everyone.
        cors_origins: web pages from these origins may send requests.
        compare_url: of a second server, which the page at ``/`` asks beside this one.

    Source: the routes and shapes of OpenAI's API reference (completions, chat completions, models), and of vLLM's
        server where it has more.
    """
    version = _version()
    # The interactive pages of FastAPI load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="expertplan", version=version, docs_url=None, redoc_url=None)
    metrics = Metrics(engine, version, model_name, placement)
    context = ServerContext(MeteredEngine(engine, metrics), tokenizer, model_name, created)
    # The process that serves the application ends generations through the one and half-sent requests through the other.
    app.state.context = context
    app.state.reading = set()
    app.include_router(completions_router(context))
    app.include_router(chat_router(context))
    app.include_router(tokenization_router(context))
    app.include_router(facts_router(context, version))
    app.include_router(metrics_router(metrics))
    if placement is not None:
        app.include_router(placement_router(placement, engine, model_name))
    app.include_router(page_router(compare_url, context.track))
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, reading=app.state.reading)
    if api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=api_key)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    app.add_middleware(RequestLog, count=metrics.count_http_request)
    install_error_handlers(app)
    install_openapi(app, guarded=api_key is not None)
    return app


def _version() -> str:
    try:
        return metadata.version("expertplan")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
