"""The load of `bench serve`: prompts, the times they are sent at, and what comes back over HTTP.

All times are of `time.perf_counter`, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from runtime.errors import InputError, one_line

CONNECT_TIMEOUT_S = 30.0
LONGEST_ERROR = 200  # characters of a server's answer that are kept
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Target:
    """Where requests go, and what all of them say.

    Attributes:
        url: of the server, without a path.
        endpoint: ``completions`` or ``chat``.
        model: the name that requests give.
        output_tokens: the most tokens of an answer.
        ignore_eos: ask the server to go on after an end-of-sequence token, so that every answer has as many tokens.
        temperature: of the sampler.
        api_key: sent as a bearer token.
    """

    url: str
    endpoint: str
    model: str
    output_tokens: int
    ignore_eos: bool = True
    temperature: float = 0.0
    api_key: str | None = field(default=None, repr=False)

    def body(self, prompt: str | list[int]) -> dict[str, Any]:
        """The JSON body of one request."""
        what = {"messages": [{"role": "user", "content": prompt}]} if self.endpoint == "chat" else {"prompt": prompt}
        return what | {
            "model": self.model,
            "max_tokens": self.output_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }

    def client(self) -> httpx.AsyncClient:
        """A client without limits of its own: a queue in the client would be measured as the server's."""
        headers = {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        return httpx.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=timeout)


@dataclass
class Answer:
    """One request and when its answer came.

    Attributes:
        lag_s: how much later than due the client came to it.
        sent_s: when it was sent.
        text_s: when each piece of text arrived; pieces of one read arrive together.
        end_s: when the stream ended.
        prompt_tokens: as the server counts them, 0 where it does not say.
        output_tokens: as the server counts them, else the pieces.
        error: one line that says what went wrong; None where the answer is whole.
    """

    lag_s: float = 0.0
    sent_s: float = 0.0
    text_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


def arrival_times(rate: float, number: int, seed: int) -> np.ndarray:
    """When requests are sent: a Poisson process of so many per second; an infinite rate sends all at once.

    Returns:
        Seconds from the start, rising, float64 ``[number]``; the first is 0.
    """
    gaps = np.random.default_rng(seed).exponential(1 / rate, number) if np.isfinite(rate) else np.zeros(number)
    return np.cumsum(gaps) - gaps[0]


def random_prompts(number: int, length: int, vocabulary: int, seed: int) -> list[str | list[int]]:
    """Prompts of token ids below ``vocabulary``, each of so many tokens."""
    drawn = np.random.default_rng((seed, length)).integers(vocabulary, size=(number, length))
    return [[int(token) for token in prompt] for prompt in drawn]


async def find_model(target: Target) -> str:
    """The first model that the server names.

    Raises:
        InputError: nothing answers there, or not as such a server would.
    """
    try:
        async with target.client() as client:
            response = await client.get("/v1/models", timeout=CONNECT_TIMEOUT_S)
        if response.status_code != httpx.codes.OK:
            raise InputError(f"{target.url}/v1/models: HTTP {response.status_code} {_error_of(response.text)}")
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPError as error:
        raise InputError(f"{target.url}: no answer ({one_line(error)}); start the server, or give its URL") from error
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{target.url}/v1/models: names no model; give --model") from error


async def send_all(
    target: Target, prompts: Sequence[str | list[int]], arrivals_s: Sequence[float], concurrency: int | None
) -> list[Answer]:
    """Send every prompt at its time and wait for all answers.

    Args:
        target: where to.
        prompts: text or token ids.
        arrivals_s: when each is due, in seconds from now.
        concurrency: the most requests open at once; one that is due later waits, and its times count from its sending.

    Returns:
        One answer per prompt, in order.
    """
    gate = asyncio.Semaphore(concurrency or max(1, len(prompts)))
    bodies = [json.dumps(target.body(prompt)).encode() for prompt in prompts]
    async with target.client() as client:
        start_s = time.perf_counter()

        async def at(due_s: float, body: bytes) -> Answer:
            await asyncio.sleep(start_s + due_s - time.perf_counter())
            answer = Answer(time.perf_counter() - start_s - due_s)
            async with gate:
                await send(client, PATHS[target.endpoint], body, answer)
            return answer

        return await asyncio.gather(*(at(due, body) for due, body in zip(arrivals_s, bodies, strict=True)))


async def send(client: httpx.AsyncClient, path: str, body: bytes, answer: Answer) -> None:
    """One request; whatever goes wrong is noted in its answer."""
    headers = {"content-type": "application/json"}
    answer.sent_s = time.perf_counter()
    try:
        async with client.stream("POST", path, content=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                answer.error = f"HTTP {response.status_code}: {_error_of(text)}"
                return
            await _read(response, answer)
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {one_line(error)}"[:LONGEST_ERROR]
    finally:
        answer.end_s = time.perf_counter()


async def _read(response: httpx.Response, answer: Answer) -> None:
    """Follow a stream of server-sent events to its end."""
    rest, done = b"", False
    async for received in response.aiter_bytes():
        now_s = time.perf_counter()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
            else:
                _note(data, now_s, answer)
    if answer.error is None and not done:
        answer.error = "the stream ended without [DONE]"
    if answer.error is None and not answer.text_s:
        answer.error = "the answer has no text"
    answer.output_tokens = answer.output_tokens or len(answer.text_s)


def _note(data: bytes, now_s: float, answer: Answer) -> None:
    """What one event says."""
    try:
        event = json.loads(data)
        if "error" in event:
            answer.error = f"in the stream: {_error_of(data.decode(errors='replace'))}"
            return
        for choice in event.get("choices") or ():
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                answer.text_s.append(now_s)
        usage = event.get("usage")
        if usage:
            answer.prompt_tokens, answer.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    except (ValueError, LookupError, TypeError, AttributeError):
        answer.error = f"not an event of this interface: {data[:LONGEST_ERROR].decode(errors='replace')}"


def _error_of(text: str) -> str:
    """The message in an error's JSON, or the text itself, on one line."""
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:LONGEST_ERROR]
