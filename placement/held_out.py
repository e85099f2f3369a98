"""Which tokens plans are solved on, and which others they are judged on.

Held out are either sequences (solved on the even ones, judged on the odd ones) or whole domains: by falling number of
tokens each domain goes to the half that has fewer tokens so far, the first half where both have as many; solved on all
sequences of the first half, judged on all of the second.

Shape suffixes: T tokens, S sequence ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from placement.errors import ProblemError
from profiler.statistics import UNNAMED_DOMAIN
from profiler.trace_format import RoutingTrace

HeldOut = Literal["sequences", "domains"]


@dataclass(frozen=True)
class HeldOutSplit:
    """Which tokens plans are solved on and judged on.

    Attributes:
        held_out: what the two have apart.
        solve_T, judge_T: bool [T].
        solved_on, judged_on: in words.
    """

    held_out: HeldOut
    solve_T: NDArray[np.bool_]
    judge_T: NDArray[np.bool_]
    solved_on: str
    judged_on: str


def splits(trace: RoutingTrace, held_out: Sequence[HeldOut]) -> list[HeldOutSplit]:
    """The splits of a trace's tokens, as the module says; ``domains`` is left out where fewer than two have tokens.

    Raises:
        InputError: sequences are asked for and the trace has but one, or nothing is left to judge on.
    """
    found = []
    for kind in dict.fromkeys(held_out):
        if kind == "sequences":
            masks = trace.split_mask("even"), trace.split_mask("odd")
            found.append(HeldOutSplit(kind, *masks, "even sequences", "odd sequences"))
        elif has_domains(trace):
            found.append(_split_domains(trace))
    if not found:
        raise ProblemError(
            f"held_out {list(held_out)}: the trace has tokens of fewer than two domains; take held_out=[sequences], or "
            "record prompts of several domains"
        )
    return found


def has_domains(trace: RoutingTrace) -> bool:
    """Whether a trace has tokens of at least two domains."""
    return trace.domains is not None and len({trace.domains[sequence] for sequence in np.unique(trace.sequence())}) > 1


def _split_domains(trace: RoutingTrace) -> HeldOutSplit:
    assert trace.domains is not None
    names, domain_S = np.unique(trace.domains, return_inverse=True)
    domain_T = domain_S[trace.sequence()]
    tokens = np.bincount(domain_T, minlength=len(names))
    halves: tuple[list[int], list[int]] = ([], [])
    for domain in np.argsort(-tokens, kind="stable"):
        if tokens[domain]:
            smaller = min(halves, key=lambda half: int(tokens[half].sum()))
            smaller.append(int(domain))
    masks = [np.isin(domain_T, half) for half in halves]
    words = ["domains " + ", ".join(str(names[domain]) or UNNAMED_DOMAIN for domain in half) for half in halves]
    return HeldOutSplit("domains", masks[0], masks[1], words[0], words[1])
