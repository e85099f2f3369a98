"""`python -m runtime bench serve`: a load on any server with OpenAI's interface, and what its users would feel."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from placement import provenance
from placement.atomic import write_atomically
from profiler.prompts import read_prompts
from runtime.bench_serve_figures import count_errors, measure, table
from runtime.bench_serve_flags import check_flags, parse_goals
from runtime.bench_serve_load import Target, arrival_times, find_model, random_prompts, send_all
from runtime.errors import InputError

SHOWN_ERRORS = 5
MOST_LAG_MS = 20.0  # later than this the client is too busy to measure well


def bench_serve(flags: argparse.Namespace) -> int:
    """Send the load, print its figures and save them.

    Returns:
        0, or 1 where no request was answered.

    Raises:
        InputError: a flag is out of range, or the server cannot be reached or refuses such requests.
    """
    if flags.overrides:
        raise InputError(f"{flags.overrides[0]}: bench serve takes no settings; see bench serve --help")
    rate = check_flags(flags)
    goals = parse_goals(flags.goodput) if flags.goodput else {}
    prompts = _prompts(flags)
    target = Target(
        flags.url.rstrip("/"),
        flags.endpoint,
        flags.model or "",
        flags.output_len,
        not flags.stop_at_eos,
        flags.temperature,
        flags.api_key or os.environ.get("OPENAI_API_KEY") or None,
    )
    arrivals = arrival_times(rate, flags.num_prompts, flags.seed).tolist()

    async def run() -> Any:
        ready = target if target.model else replace(target, model=await find_model(target))
        for answer in await send_all(ready, prompts[:1] * flags.warmup, [0.0] * flags.warmup, 1):
            if answer.error is not None:
                raise InputError(f"{ready.url}: the first request failed: {answer.error}")
        return ready, await send_all(ready, prompts, arrivals, flags.concurrency)

    used, answers = asyncio.run(run())
    errors = count_errors(answers)
    _show_errors(errors)
    if all(answer.error is not None for answer in answers):
        print(f"error: none of {len(answers)} requests was answered", file=sys.stderr)
        return 1
    row = _describe(flags, used) | measure(answers, goals) | {"errors": "; ".join(f"{n} x {e}" for e, n in errors)}
    print(table(row))
    if row["p99_client_lag_ms"] > MOST_LAG_MS:
        lag = f"{row['p99_client_lag_ms']:.0f} ms late (p99)"
        print(f"warning: the client itself was {lag}; its latencies are too long: lower the load", file=sys.stderr)
    if flags.output is not None:
        _save(row, flags)
    return 0


def _show_errors(errors: Sequence[tuple[str, int]]) -> None:
    for error, times in errors[:SHOWN_ERRORS]:
        print(f"{times} x {error}", file=sys.stderr)
    if len(errors) > SHOWN_ERRORS:
        print(f"and {len(errors) - SHOWN_ERRORS} other errors", file=sys.stderr)


def _save(row: dict[str, Any], flags: argparse.Namespace) -> None:
    """Write the row, without the key that the command may hold."""
    document = provenance.describe_run(("httpx",)) | {"rows": [row]}
    if flags.api_key:
        for secret in (shlex.quote(flags.api_key), flags.api_key):
            document["command"] = document["command"].replace(secret, "***")
    document["device"] = flags.device or f"unknown server; client on {document['device']}"
    write_atomically(Path(flags.output), json.dumps(document, indent=1) + "\n")


def _prompts(flags: argparse.Namespace) -> list[str | list[int]]:
    if flags.prompts is None:
        return random_prompts(flags.num_prompts, flags.input_len, flags.vocab_size, flags.seed)
    texts = [prompt.text for prompt in read_prompts(Path(flags.prompts), flags.num_prompts)]
    return [texts[number % len(texts)] for number in range(flags.num_prompts)]


def _describe(flags: argparse.Namespace, target: Target) -> dict[str, Any]:
    """What the row says of the load."""
    source = "random token ids" if flags.prompts is None else Path(flags.prompts).name
    return {
        "engine": flags.engine,
        "device": flags.device or "unknown",
        "model": Path(target.model).name,
        "endpoint": target.endpoint,
        "request_rate_per_s": flags.request_rate,
        "concurrency": flags.concurrency,
        "prompts": source,
        "input_tokens": flags.input_len if flags.prompts is None else None,
        "max_output_tokens": flags.output_len,
        "ignore_eos": target.ignore_eos,
        "temperature": target.temperature,
        "seed": flags.seed,
    }
