"""What engines' answers to requests have in common: JSON lines, the prompt's length, and tokens without routes.

An engine returns a route for every token but the last, which was generated and never fed. So a whole answer has
prompt + generated − 1 rows; fewer mean that it was asked to leave out the first ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiler.importers.checks import TOO_LARGE, check_routes, require_mapping, shown
from profiler.importers.recording import ModelFacts, RecordedSequence, RecordingError, Remarks

_UNROUTED = "tokens without routes cut"
_REPEATED = "prompt tokens of further choices left out"


@dataclass(frozen=True)
class Answer:
    """One response of an engine.

    Attributes:
        body: the JSON object.
        where: file and line, for messages.
        choices: the objects that hold routes: the body's ``choices``, or the body itself.
        prompt_tokens: fed in prefill; None where the body does not say.
        seen_tokens: all tokens that were fed, where the body says and has one choice.
        domain: of the request, if somebody added it.
    """

    body: Mapping[str, Any]
    where: str
    choices: tuple[Mapping[str, Any], ...]
    prompt_tokens: int | None
    seen_tokens: int | None
    domain: str | None


def read_lines(paths: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every JSON object of the files with its place; a line may hold a list of them, empty lines are skipped.

    Raises:
        RecordingError: a file cannot be read, or a line is no JSON object.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        value = _parse(line, where)
                        for item in value if isinstance(value, list) else [value]:
                            yield where, require_mapping(item, where, "a JSON object, one response per line")
        except OSError as error:
            raise RecordingError(f"{path}: cannot be read ({error.strerror}); give a file of responses") from error
        except UnicodeDecodeError as error:
            raise RecordingError(f"{path}: not UTF-8 text; give JSON lines, one response per line") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordingError(f"{where}: not JSON; give one response per line, as curl prints it") from error


def read_answer(body: Mapping[str, Any], where: str) -> Answer:
    """The parts of a response that both engines write alike.

    Raises:
        RecordingError: a length is no number, or ``choices`` or ``domain`` is malformed.
    """
    listed = body.get("choices", [body])
    if not isinstance(listed, list) or not listed:
        raise RecordingError(f"{where}: choices is {shown(listed)}, expected the choices of a response")
    choices = tuple(require_mapping(choice, where, "a choice") for choice in listed)
    counts: Mapping[str, Any] = body
    for name in ("usage", "meta_info"):
        if isinstance(body.get(name), Mapping):
            counts = body[name]
    prompt = _length(counts, "prompt_tokens", where)
    completion = _length(counts, "completion_tokens", where)
    seen = None
    if prompt is not None and completion is not None and len(choices) == 1:
        seen = max(prompt + completion - 1, prompt)
    domain = body.get("domain")
    if domain is not None and (not isinstance(domain, str) or not domain):
        raise RecordingError(f"{where}: domain is {shown(domain)}, expected a name; leave it out where there is none")
    return Answer(body, where, choices, prompt, seen, domain)


def _length(counts: Mapping[str, Any], name: str, where: str) -> int | None:
    value = counts.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < TOO_LARGE):
        raise RecordingError(f"{where}: {name} is {shown(value)}, expected a number of tokens")
    return value


def answer_sequence(
    answer: Answer,
    choice: int,
    experts_TLK: np.ndarray,
    facts: ModelFacts,
    layer_ids: tuple[int, ...],
    remarks: Remarks,
) -> RecordedSequence | None:
    """The tokens of one choice; the prompt counts once, with the first choice.

    Args:
        answer: the response.
        choice: index among its choices.
        experts_TLK: integer ``[T, L, K]``, MoE layers alone, up to the last token that was fed.
        facts: the model, whose number of experts is known.
        layer_ids: of the second dimension.
        remarks: what was left out.

    Returns:
        The sequence, or None where no token is left.

    Raises:
        RecordingError: there are more rows than tokens, or an id is out of range or stands twice.
    """
    start = 0
    if answer.seen_tokens is not None:
        start = answer.seen_tokens - len(experts_TLK)
        if start < 0:
            raise RecordingError(
                f"{answer.where}: routes of {len(experts_TLK)} tokens, but {answer.seen_tokens} were fed: another "
                "number of layers or experts per token; name the model of the recording"
            )
        remarks.count("tokens at the start of prompts that were not asked for", start)
    position = start + np.arange(len(experts_TLK))
    kept = ~_without_routes(experts_TLK)
    remarks.count(_UNROUTED, int((~kept).sum()))
    if answer.prompt_tokens is None:
        if len(answer.choices) > 1:
            raise RecordingError(f"{answer.where}: several choices and no prompt_tokens; keep the response's usage")
        remarks.count("responses that do not tell their prompt's length, all of them counted as prefill")
        decode = np.zeros(len(position), bool)
    else:
        decode = position >= answer.prompt_tokens
        if choice:
            remarks.count(_REPEATED, int((kept & ~decode).sum()))
            kept &= decode
    experts = experts_TLK[kept]
    assert facts.num_experts is not None
    check_routes(experts, facts.num_experts, layer_ids, answer.where)
    if not len(experts):
        return None
    return RecordedSequence(experts, position[kept], decode[kept], domain=answer.domain)


def _without_routes(experts_TLK: np.ndarray) -> np.ndarray:
    """Tokens that no router saw, bool ``[T]``: filled with −1, or, where K > 1 shows that it is no route, with 0."""
    unset = (experts_TLK == -1).all(axis=(1, 2))
    return unset | (experts_TLK == 0).all(axis=(1, 2)) if experts_TLK.shape[2] > 1 else unset
