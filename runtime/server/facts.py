"""The routes that generate nothing: health, version, models."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from runtime.server.context import ServerContext
from runtime.server.errors import ApiError


class Health(BaseModel):
    """What ``/health`` says while requests are taken."""

    status: str = "ok"


class Version(BaseModel):
    """What ``/version`` says."""

    version: str


class Model(BaseModel):
    """A model in OpenAI's shape; ``max_model_len`` as vLLM adds it."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "expertplan"
    max_model_len: int


class ModelList(BaseModel):
    """All models in OpenAI's shape."""

    object: str = "list"
    data: list[Model]


def facts_router(context: ServerContext, version: str) -> APIRouter:
    """The routes, for one served model."""
    router = APIRouter()

    def model() -> Model:
        return Model(id=context.model_name, created=context.created, max_model_len=context.engine.max_context)

    @router.get("/health")
    async def health() -> Health:
        """Whether requests are taken; 503 while they are not."""
        status = context.engine.status()
        reason = context.stopping or status.failure
        if reason is not None or not status.ready:
            raise ApiError(503, reason or "the engine is not ready yet", code="not_ready")
        return Health()

    @router.get("/version")
    async def read_version() -> Version:
        """The project's version."""
        return Version(version=version)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[model()])

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Model:
        """The served model; hub ids contain a slash."""
        context.check_model(model_id)
        return model()

    return router
