"""What every route needs: the engine, the tokenizer, and the way from a request's fields to the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

from jinja2 import TemplateError

from runtime.requests import EngineError
from runtime.server.detokenizer import DetokenizerFactory
from runtime.server.errors import ApiError, bad_request, quote
from runtime.server.generation import Generation, Submission
from runtime.server.metered_engine import MeteredEngine
from runtime.server.parameters import refuse_unsupported
from runtime.server.sampling_fields import sampling_parameters
from runtime.server.schemas import ChatMessage, GenerationRequest, Prompt
from runtime.server.token_texts import TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CHOICES = 256


class Abortable(Protocol):
    """An answer under way, which may have to be ended by an error."""

    def abort(self, reason: str) -> None:
        """End it; called on the event loop."""
        ...


class ServerContext:
    """One served model.

    Args:
        engine: takes tokens, gives tokens, and is timed.
        tokenizer: the model's own.
        model_name: the name that requests give.
        created: Unix time in s that ``/v1/models`` reports.
    """

    def __init__(
        self, engine: MeteredEngine, tokenizer: PreTrainedTokenizerBase, model_name: str, created: int
    ) -> None:
        self.engine = engine
        self.model_name = model_name
        self.created = created
        self._tokenizer = tokenizer
        self.token_texts = TokenTexts(tokenizer)
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._vocabulary_size = len(tokenizer)
        # Encoding long text takes a while, so it runs in a thread; the tokenizer's state allows one at a time.
        self._encoding = asyncio.Lock()
        # Weak: a generation ends with its answer, whichever way that goes.
        self._running: WeakSet[Abortable] = WeakSet()
        # Why no more requests are taken, once they are not.
        self.stopping: str | None = None
        self._aborted: str | None = None

    def check(self, body: GenerationRequest, num_prompts: int) -> None:
        """Refuse a request for another model, for too many choices, or for what this server does not have.

        Raises:
            ApiError: 404 or 400.
        """
        if body.model is not None:
            self.check_model(body.model)
        refuse_unsupported(body)
        self.check_token_ids(list(body.logit_bias or ()), "logit_bias")
        self.check_token_ids(body.stop_token_ids or (), "stop_token_ids")
        copies = body.n or 1
        if num_prompts * copies > MAX_CHOICES:
            text = f"{num_prompts} prompts with n={copies} are {num_prompts * copies} choices, more than {MAX_CHOICES}"
            raise bad_request(f"{text}; send several requests", "n")
        if body.stream_options is not None and not body.stream:
            raise bad_request(
                "stream_options is for streams only; set stream to true or leave it out", "stream_options"
            )

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 unless ``name`` is the served model."""
        if name != self.model_name:
            text = f"the model {quote(name)} does not exist here; this server has {quote(self.model_name)}"
            raise ApiError(404, text, param="model", code="model_not_found")

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a completion's prompt; text gets the tokenizer's special tokens, ids are checked and kept.

        Raises:
            ApiError: 400, for a token id that the model does not have, or a prompt of no tokens.
        """
        if isinstance(prompt, str):
            token_ids = await self.encode(prompt, add_special_tokens=True)
        else:
            token_ids = prompt
            self.check_token_ids(prompt, "prompt")
        if not token_ids:
            raise bad_request("prompt: it has no tokens; give at least one character", "prompt")
        return token_ids

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation, written out by the tokenizer's chat template.

        Raises:
            ApiError: 400, if there is no template or it does not take these messages.
        """
        token_ids = await self.encode(await self.render_chat(messages), add_special_tokens=False)
        if not token_ids:
            raise bad_request("messages: the chat template makes no tokens of them; say something", "messages")
        return token_ids

    async def render_chat(self, messages: Sequence[ChatMessage], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with the beginning of an answer if that is wanted.

        Raises:
            ApiError: 400, if there is no template or it does not take these messages.
        """
        if self._tokenizer.chat_template is None:
            text = f"the tokenizer of {quote(self.model_name)} has no chat template; use /v1/completions"
            raise bad_request(text, "messages", "no_chat_template")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        async with self._encoding:
            try:
                return await asyncio.to_thread(self._render, conversation, add_generation_prompt)
            except (TemplateError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise bad_request(f"messages: the chat template refuses them: {reason}", "messages") from error

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        async with self._encoding:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        async with self._encoding:
            return await asyncio.to_thread(self._decode, list(token_ids))

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's entries for token ids."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise ApiError 400 for a token id that the model does not have."""
        for token_id in token_ids:
            if not 0 <= token_id < self._vocabulary_size:
                most = self._vocabulary_size - 1
                raise bad_request(f"{param}: token id {quote(token_id)} is not within 0..{most}", param)

    def generate(
        self,
        body: GenerationRequest,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | None,
        default_tokens: int | None,
    ) -> Generation:
        """Submit ``n`` choices per prompt, prompt by prompt.

        Args:
            body: the request.
            prompts: token ids of each prompt.
            max_tokens: what the request asks for, or None.
            default_tokens: the most tokens where it asks for none; None takes the rest of the context.

        Raises:
            ApiError: 400, if a prompt with its tokens is longer than the context.
            EngineError: the engine is down, or the server about to end.
        """
        if self._aborted is not None:
            raise EngineError(self._aborted)
        rooms = [self._room(len(prompt), max_tokens, default_tokens) for prompt in prompts]
        submissions = [
            Submission(prompt, sampling_parameters(body, room, copy), body.user or "")
            for prompt, room in zip(prompts, rooms, strict=True)
            for copy in range(body.n or 1)
        ]
        generation = Generation(self.engine, submissions, self._detokenizers, body.stop or ())
        self.track(generation)
        return generation

    def track(self, running: Abortable) -> None:
        """Let ``abort_generations`` end this too; called on the event loop."""
        self._running.add(running)
        if self._aborted is not None:
            running.abort(self._aborted)

    def abort_generations(self, reason: str) -> None:
        """End every running generation by an error, and take no more; called on the event loop."""
        self._aborted = reason
        for running in list(self._running):
            running.abort(reason)

    def _room(self, prompt_tokens: int, max_tokens: int | None, default_tokens: int | None) -> int:
        """How many tokens to generate after a prompt."""
        context = self.engine.max_context
        rest = context - prompt_tokens
        code = "context_length_exceeded"
        if rest < 1:
            text = f"the prompt has {prompt_tokens} tokens, the context {context} with the generated ones"
            raise bad_request(f"{text}; shorten the prompt to at most {context - 1} tokens", "prompt", code)
        if max_tokens is None:
            return rest if default_tokens is None else min(default_tokens, rest)
        if max_tokens > rest:
            total = f"{prompt_tokens} prompt tokens + {max_tokens} max_tokens = {prompt_tokens + max_tokens}"
            raise bad_request(f"{total}, the context is {context}; ask for at most {rest}", "max_tokens", code)
        return max_tokens

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def _render(self, conversation: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)
