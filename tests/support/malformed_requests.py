"""Requests as nobody should send them, the same ones for the same seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "model", "prompt": "ab", "max_tokens": 2, "temperature": 0.5, "seed": 1, "n": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2, "stream": False},
    "/tokenize": {"prompt": "ab", "add_special_tokens": False},
    "/detokenize": {"tokens": [5, 6, 7]},
}
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 1e-320),
    *("", " ", "a", "\x00", "\ud800", "\u202e\u0000", "ß" * 300, "a" * 5000, "-1", "NaN", "null", "true"),
    *([], [[]], [None], [1, "a"], [[1], ["a"]], ["a"] * 300, [-1], [2**70], {}, {"": {}}, {"a": [1]}),
    *(
        {"type": "text", "text": "a"},
        [{"type": "text", "text": 1}],
        [{"role": "user"}],
        {"role": "user", "content": {}},
    ),
)
NAMES = (
    *(
        "prompt",
        "messages",
        "model",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
    ),
    *("stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "suffix", "best_of", "logit_bias"),
    *("user", "tools", "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "min_p", "tokens"),
    *("ignore_eos", "__proto__", "", "\x00", "é", "metadata"),
)
TYPES = (
    *("application/json", "application/json; charset=utf-16", "text/plain", "application/x-www-form-urlencoded"),
    *("multipart/form-data; boundary=x", "application/json;;", "", "a/b/c"),
)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")
ODD_PATHS = (
    *("/v1/completions/", "//v1/completions", "/v1/completions%00", "/v1/../v1/completions", "/V1/COMPLETIONS"),
    *("/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/models/", "/v1/models/%ff%fe", "/%", "/?", "/" + "a" * 4000),
    *("/v1/models/a%0d%0aSet-Cookie:%20x=1", "/openapi.json?x=%00", "/metrics?name[]=%ff", "/v1/placement/load?a=b"),
)


@dataclass(frozen=True)
class Malformed:
    """A request for an HTTP client."""

    method: str
    path: str
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def malformed_requests(seed: int, count: int) -> Iterator[Malformed]:
    """So many requests; some happen to be well-formed, and ask for very few tokens."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        path = rng.choice(PATHS)
        if kind < 0.7:
            content = _mutated_body(rng, path)
            content_type = rng.choice(TYPES) if rng.random() < 0.1 else "application/json"
            yield Malformed("POST", path, content, {"Content-Type": content_type})
        elif kind < 0.85:
            yield Malformed("POST", path, rng.randbytes(rng.randrange(400)), {"Content-Type": rng.choice(TYPES)})
        elif kind < 0.92:
            yield Malformed(rng.choice(METHODS), path, b"{}" if rng.random() < 0.5 else b"")
        else:
            yield Malformed(rng.choice(("GET", "POST")), rng.choice(ODD_PATHS), b"")


def _mutated_body(rng: random.Random, path: str) -> bytes:
    body: Any = json.loads(json.dumps(VALID[path]))
    for _ in range(rng.randint(1, 3)):
        choice = rng.random()
        if choice < 0.5:
            body[rng.choice(list(body) or ["prompt"])] = rng.choice(JUNK)
        elif choice < 0.8:
            body[rng.choice(NAMES)] = rng.choice(JUNK)
        elif body:
            del body[rng.choice(list(body))]
    # More tokens than a few would only take time.
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and not isinstance(body[name], bool) and body[name] > 2:
            body[name] = rng.choice((2, 10**9))
    if path.startswith("/v1/chat") and body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        body["max_tokens"] = 2
    text = json.dumps(body)
    damage = rng.random()
    if damage < 0.1:
        text = text[: rng.randrange(len(text))]
    elif damage < 0.2:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice('{}[]":,\\\x00\x1f') + text[place:]
    elif damage < 0.23:
        text = "[" * rng.randrange(1, 60_000) + text
    return text.encode("utf-8", "surrogatepass")


# What no HTTP client would send: written to the connection as it is.
RAW = (
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # the beginning of TLS
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\nContent-Length: 3\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
)
