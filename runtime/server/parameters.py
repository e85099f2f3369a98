"""Parameters that this server does not have: refused where they would change the result, accepted where not."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from runtime.server.errors import bad_request, quote

# Accepted and not used: they do not change what the model writes.
HARMLESS = frozenset(
    {
        "include_obfuscation",
        "metadata",
        "name",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)

# The values that ask for nothing (beside null), by parameter. False is not 0 here: 0 log-probabilities are some.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),  # a chat's
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),  # a completion's
    "verbosity": (),
    "web_search_options": (),
}

# What there is instead, or what is missing.
REASONS = {
    "echo": "prompts are not repeated; put yours before the answer",
    "function_call": "functions are not called here",
    "functions": "functions are not called here",
    "response_format": "answers are free text, {'type': 'text'}; ask for JSON in the prompt and check the answer",
    "tool_choice": "tools are not called here",
    "tools": "tools are not called here",
}


def refuse_unsupported(body: BaseModel, prefix: str = "") -> None:
    """Raise for a parameter that is not supported, also in the models inside ``body``.

    Raises:
        ApiError: 400, with the parameter's name, its value and the remedy.
    """
    for name, value in (body.model_extra or {}).items():
        if value is None or name in HARMLESS or _is_neutral(name, value):
            continue
        known = "is not supported" if name in NEUTRAL else "is unknown"
        reason = f": {REASONS[name]}" if name in REASONS else ""
        text = f"parameter {quote(prefix + name)} {known} (got {quote(value)}){reason}; leave it out"
        raise bad_request(text, prefix + name, "unsupported_parameter")
    for name, value in body:
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            if isinstance(child, BaseModel):
                position = f"{index}." if isinstance(value, list) else ""
                refuse_unsupported(child, f"{prefix}{name}.{position}")


def _is_neutral(name: str, value: Any) -> bool:
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
