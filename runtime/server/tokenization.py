"""``POST /tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from runtime.server.context import ServerContext
from runtime.server.errors import bad_request
from runtime.server.parameters import refuse_unsupported
from runtime.server.schemas import ChatMessage, Schema, check_unicode


class TokenizeRequest(Schema):
    """The body of ``POST /tokenize``: a prompt or a conversation."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: Annotated[str, AfterValidator(check_unicode)] | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    # Null: as generation does it, special tokens for a prompt and what the template writes for a conversation.
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class TokenizeAnswer(BaseModel):
    """Token ids, how many, and of how many the context is."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Schema):
    """The body of ``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


class DetokenizeAnswer(BaseModel):
    """The text of the tokens, special ones included."""

    prompt: str


def tokenization_router(context: ServerContext) -> APIRouter:
    """The routes, for one served model.

    Source: vLLM's OpenAI-compatible server, whose shapes these are.
    """
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeAnswer:
        """Token ids of a text, or of a conversation as the chat template writes it."""
        _check(context, body.model, body)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("expected either prompt or messages; give one of them", "prompt")
        if body.messages is None:
            assert body.prompt is not None
            tokens = await context.encode(body.prompt, body.add_special_tokens is not False)
        else:
            text = await context.render_chat(body.messages, body.add_generation_prompt)
            tokens = await context.encode(text, body.add_special_tokens is True)
        return TokenizeAnswer(
            count=len(tokens),
            max_model_len=context.engine.max_context,
            tokens=tokens,
            token_strs=context.token_strings(tokens) if body.return_token_strs else None,
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeAnswer:
        """The text of token ids."""
        _check(context, body.model, body)
        context.check_token_ids(body.tokens, "tokens")
        return DetokenizeAnswer(prompt=await context.decode(body.tokens))

    return router


def _check(context: ServerContext, model: str | None, body: BaseModel) -> None:
    """Refuse a request for another model, or for what this server does not have."""
    if model is not None:
        context.check_model(model)
    refuse_unsupported(body)
