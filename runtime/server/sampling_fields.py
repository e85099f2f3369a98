"""From a request's fields to the engine's sampling parameters."""

from __future__ import annotations

from runtime.requests import SamplingParameters
from runtime.server.errors import bad_request
from runtime.server.schemas import GenerationRequest


def sampling_parameters(body: GenerationRequest, max_tokens: int, copy: int) -> SamplingParameters:
    """How to sample one choice.

    Args:
        body: the request; its token ids are within the vocabulary.
        max_tokens: the most to generate.
        copy: which of the ``n`` choices of its prompt.

    Raises:
        ApiError: 400, if ``min_tokens`` is more than may be generated.
    """
    if (body.min_tokens or 0) > max_tokens:
        text = f"min_tokens {body.min_tokens} is more than the {max_tokens} tokens that are generated at most"
        raise bad_request(f"{text}; ask for fewer, or raise max_tokens", "min_tokens")
    return SamplingParameters(
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        seed=None if body.seed is None else _seed_of(body.seed, copy),
        max_tokens=max_tokens,
        ignore_eos=bool(body.ignore_eos),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=tuple((body.logit_bias or {}).items()),
        min_tokens=body.min_tokens or 0,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=body.num_logprobs,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _seed_of(seed: int, copy: int) -> int:
    """The copies of one prompt must differ, and still be repeatable: the seeds count on, within 64 bits."""
    return (seed + copy + 2**63) % 2**64 - 2**63
