"""What the answers of a load say: latencies, throughput, goodput.

TTFT is the time to the first piece of text, TPOT the time per token after it, ITL the time between two pieces of text,
E2E the time to the end of the stream; all from the sending of the request, all in ms.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bench_serve_load import Answer

LATENCIES = ("ttft", "tpot", "itl", "e2e")
STATISTICS = ("mean", "median", "p95", "p99")


def request_latencies(answer: Answer) -> dict[str, float]:
    """TTFT, TPOT and E2E of one whole answer, in ms; one of a single token has no TPOT."""
    first_s, end_s = answer.text_s[0], answer.end_s
    found = {"ttft": first_s - answer.sent_s, "e2e": end_s - answer.sent_s}
    if answer.output_tokens > 1:
        found["tpot"] = (answer.text_s[-1] - first_s) / (answer.output_tokens - 1)
    return {name: seconds * 1e3 for name, seconds in found.items()}


def measure(answers: Sequence[Answer], goals: Mapping[str, float]) -> dict[str, Any]:
    """A flat row of figures.

    Args:
        answers: of all requests, at least one of them whole.
        goals: the most milliseconds that a good request takes, by name; empty where no goodput is asked for.
    """
    whole = [answer for answer in answers if answer.error is None]
    latencies = [request_latencies(answer) for answer in whole]
    samples: dict[str, list[float]] = {
        name: [found[name] for found in latencies if name in found] for name in LATENCIES if name != "itl"
    }
    samples["itl"] = [(b - a) * 1e3 for answer in whole for a, b in itertools.pairwise(answer.text_s)]
    seconds = max(answer.end_s for answer in answers) - min(answer.sent_s for answer in answers)
    output_tokens = sum(answer.output_tokens for answer in whole)
    prompt_tokens = sum(answer.prompt_tokens for answer in whole)
    row: dict[str, Any] = {
        "requests": len(answers),
        "failed_requests": len(answers) - len(whole),
        "seconds": seconds,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(whole) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / seconds,
        "p99_client_lag_ms": _statistic("p99", [answer.lag_s * 1e3 for answer in answers]),
    }
    if goals:
        good = sum(all(found.get(name, 0.0) <= limit for name, limit in goals.items()) for found in latencies)
        row |= {f"goal_{name}_ms": limit for name, limit in goals.items()}
        row |= {"good_requests": good, "goodput_requests_per_s": good / seconds}
    for name, values in samples.items():
        if values:
            row |= {f"{statistic}_{name}_ms": _statistic(statistic, values) for statistic in STATISTICS}
    return row


def _statistic(name: str, values: Sequence[float]) -> float:
    if name == "mean":
        return float(np.mean(values))
    return float(np.percentile(values, {"median": 50, "p95": 95, "p99": 99}[name]))


def count_errors(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    """Different errors and how often they came, the commonest first."""
    return Counter(answer.error for answer in answers if answer.error is not None).most_common()


def table(row: Mapping[str, Any]) -> str:
    """A row as people read it."""
    tokens = f"{row['output_tokens_per_s']:.1f} output tokens/s, {row['total_tokens_per_s']:.1f} with prompts"
    lines = [
        f"{row['requests']} requests in {row['seconds']:.2f} s, {row['failed_requests']} failed",
        f"{row['requests_per_s']:.2f} requests/s, {tokens}",
    ]
    if "goodput_requests_per_s" in row:
        lines.append(f"goodput {row['goodput_requests_per_s']:.2f} requests/s ({row['good_requests']} requests)")
    lines.append(f"{'ms':<6}" + "".join(f"{statistic:>10}" for statistic in STATISTICS))
    for name in LATENCIES:
        if f"mean_{name}_ms" in row:
            figures = "".join(f"{row[f'{statistic}_{name}_ms']:>10.2f}" for statistic in STATISTICS)
            lines.append(f"{name.upper():<6}{figures}")
    return "\n".join(lines)
