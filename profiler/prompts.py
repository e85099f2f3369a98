"""Reads files of prompts, and turns prompts into token ids that fit the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(InputError):
    """A file of prompts that is missing or malformed, or a prompt that the model cannot take."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        text: what the model is to continue.
        domain: what it is about, or None.
        place: file and line, for messages.
    """

    text: str
    domain: str | None
    place: str


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Read prompts in the order of the file; empty lines are skipped.

    Args:
        path: JSON lines with ``prompt`` and optionally ``domain``, or plain text (``.txt``), one prompt per line.
        limit: stop after so many.

    Returns:
        At least one prompt.

    Raises:
        PromptError: the file is missing, not UTF-8, holds no prompt, or a line is malformed.
    """
    prompts: list[Prompt] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(prompts) == limit:
                    break
                if line.strip():
                    place = f"{path}, line {number}"
                    plain = path.suffix == ".txt"
                    prompts.append(Prompt(line.rstrip("\r\n"), None, place) if plain else _parse(line, place))
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror}); give a file of prompts") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text; give JSON lines or a .txt file in UTF-8") from error
    if not prompts:
        raise PromptError(f'{path}: holds no prompts; give one {{"prompt": "..."}} per line')
    return prompts


def _parse(line: str, place: str) -> Prompt:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PromptError(
            f'{place}: not JSON ({error}); give one {{"prompt": "..."}} per line, or plain text in a .txt file'
        ) from error
    prompt: Any = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f'{place}: has no text under "prompt"; give {{"prompt": "...", "domain": "..."}}')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{place}: the prompt holds half of a surrogate pair; give whole characters") from error
    domain = value.get("domain")
    if domain is not None and (not isinstance(domain, str) or not domain):
        raise PromptError(f"{place}: domain is {domain!r}, expected a name; leave it out where there is none")
    return Prompt(prompt, domain, place)


def tokenize_prompts(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    context_tokens: int | None,
    max_prompt_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of every prompt, checked against the model's context.

    Args:
        prompts: what to tokenise.
        tokenizer: the model's own; it adds the special tokens that it adds by default.
        max_new_tokens: how many tokens are to be generated after each prompt.
        context_tokens: positions the model has, or None where it sets no limit.
        max_prompt_tokens: cut longer prompts to their first so many tokens.

    Returns:
        One list of ids per prompt.

    Raises:
        PromptError: a prompt gives no token, or does not fit the context.
    """
    token_ids: list[list[int]] = []
    for prompt in prompts:
        ids = tokenizer(prompt.text, truncation=False, verbose=False)["input_ids"][:max_prompt_tokens]
        if not ids:
            raise PromptError(f"{prompt.place}: the tokenizer makes no token of it; remove it")
        if context_tokens is not None and len(ids) + max_new_tokens > context_tokens:
            raise PromptError(
                f"{prompt.place}: {len(ids)} tokens and {max_new_tokens} new ones exceed the context of "
                f"{context_tokens}; shorten it, or set max_prompt_tokens={max(context_tokens - max_new_tokens, 1)} or "
                "a smaller max_new_tokens"
            )
        token_ids.append(ids)
    return token_ids
