"""Flags of `bench serve`, and what they may be."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from urllib.parse import urlsplit

from profiler.trace_header import require_output
from runtime.errors import InputError

ENDPOINTS = ("completions", "chat")
GOALS = ("ttft", "tpot", "e2e")  # of one request; its ITL is not one number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--url", required=True, help="of the server, as http://127.0.0.1:8000")
    parser.add_argument("--request-rate", default="inf", metavar="R", help="requests per second (Poisson), or inf")
    parser.add_argument("--num-prompts", type=int, default=100, metavar="N", help="requests to send")
    parser.add_argument("--concurrency", type=int, metavar="C", help="the most requests open at once")
    parser.add_argument("--input-len", type=int, default=128, help="token ids of each random prompt")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--vocab-size", type=int, default=1000, help="random prompts are of token ids below this")
    parser.add_argument("--prompts", metavar="FILE", help="send these instead (JSON lines or .txt), over and over")
    parser.add_argument("--endpoint", choices=ENDPOINTS, default="completions")
    parser.add_argument("--stop-at-eos", action="store_true", help="let answers end before --output-len tokens")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and random prompts")
    parser.add_argument(
        "--goodput", metavar="GOALS", help="the most ms of a good request, as ttft:500,tpot:50,e2e:9000"
    )
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="requests sent before, one by one, untimed")
    parser.add_argument("--model", help="name of the model; by default the first that the server has")
    parser.add_argument("--api-key", help="by default $OPENAI_API_KEY")
    parser.add_argument("--engine", default="unknown", help="what serves, with its version, for the saved row")
    parser.add_argument("--device", help="what it runs on, for the saved row")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the row as JSON")


def check_flags(flags: argparse.Namespace) -> float:
    """Refuse flags that make no load.

    Returns:
        The request rate as a number.

    Raises:
        InputError: a flag is out of range, or the output cannot be written.
    """
    if not _is_server(flags.url):
        raise InputError(f"--url {flags.url}: expected http://HOST:PORT without a user; a key goes into --api-key")
    counts = ("num_prompts", "input_len", "output_len", "vocab_size", "concurrency")
    least = [(name, getattr(flags, name), 1) for name in counts if getattr(flags, name) is not None]
    for name, number, lowest in [*least, ("seed", flags.seed, 0), ("warmup", flags.warmup, 0)]:
        if number < lowest:
            raise InputError(f"--{name.replace('_', '-')} {number}: expected at least {lowest}")
    if not 0 <= flags.temperature < math.inf:
        raise InputError(f"--temperature {flags.temperature}: expected a number from 0 on")
    try:
        rate = float(flags.request_rate)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise InputError(f"--request-rate {flags.request_rate}: expected requests per second above 0, or inf")
    if flags.endpoint == "chat" and flags.prompts is None:
        raise InputError("--endpoint chat: messages are text; give --prompts FILE")
    if flags.output is not None:
        require_output(Path(flags.output), [Path(flags.prompts)] if flags.prompts else [])
    return rate


def _is_server(url: str) -> bool:
    """Whether it names a server, and no user: it is saved."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:  # of the port, or of half an IPv6 address
        return False


def parse_goals(text: str) -> dict[str, float]:
    """``ttft:500,tpot:50`` as milliseconds by name.

    Raises:
        InputError: an unknown name, or no positive number.
    """
    goals: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = 0.0
        if name not in GOALS or not 0 < limit < float("inf") or name in goals:
            raise InputError(
                f"--goodput {text}: expected {', '.join(GOALS)}, each once, with milliseconds, as in ttft:500,tpot:50"
            )
        goals[name] = limit
    return goals
