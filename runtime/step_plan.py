"""What rank 0 tells every rank to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.requests import SamplingParameters


@dataclass(frozen=True)
class Admission:
    """A sequence that starts, or goes on after it was preempted.

    Attributes:
        sequence: its number, unique among those that run.
        tokens: the prompt's token ids, and those that it generated before it was preempted.
        home: the rank that samples it (and, in ``alltoall``, that alone holds its cache).
        sampling: of its tokens, resolved by `SamplingParameters.resolved`.
        generated: how many of ``tokens``, at their end, the sequence generated before it was preempted.
        pages: native path: of its cache, with room for all of ``tokens``.
        cached: how many of ``tokens``, at their start, the pages hold already.
    """

    sequence: int
    tokens: list[int]
    home: int
    sampling: SamplingParameters
    generated: int = 0
    pages: list[int] = field(default_factory=list)
    cached: int = 0


@dataclass(frozen=True)
class Piece:
    """A sequence's tokens from ``start`` to ``stop``, fed in one step; with its last one, a new one is sampled."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class StepPlan:
    """One step of all ranks, in the order of the attributes.

    Attributes:
        retire: sequences that ended or are preempted; they leave all they hold.
        admit: sequences that come.
        grow: native path: pairs of a sequence and a page that its next token needs.
        feed: pieces of prompts.
        decode: whether the sequences whose prompts were fed in earlier steps take a step.
        stop: leave the loop.
    """

    retire: list[int] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    grow: list[tuple[int, int]] = field(default_factory=list)
    feed: list[Piece] = field(default_factory=list)
    decode: bool = True
    stop: bool = False

    @staticmethod
    def prefill(admissions: Sequence[Admission], retire: Sequence[int] = ()) -> StepPlan:
        """Feed whole prompts while what runs pauses."""
        feed = [Piece(admission.sequence, admission.cached, len(admission.tokens)) for admission in admissions]
        return StepPlan(list(retire), list(admissions), feed=feed, decode=False)

    @property
    def prompt_tokens(self) -> int:
        """Tokens in all pieces."""
        return sum(piece.stop - piece.start for piece in self.feed)

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dictionaries."""
        message = dict(vars(self))
        message["admit"] = [vars(admission) | {"sampling": asdict(admission.sampling)} for admission in self.admit]
        message["feed"] = [(piece.sequence, piece.start, piece.stop) for piece in self.feed]
        return message

    @staticmethod
    def from_json(message: Mapping[str, Any]) -> StepPlan:
        """Back from `to_json`."""
        return StepPlan(
            retire=list(message["retire"]),
            admit=[
                Admission(**admission | {"sampling": SamplingParameters.from_json(admission["sampling"])})
                for admission in message["admit"]
            ],
            grow=[(sequence, page) for sequence, page in message["grow"]],
            feed=[Piece(*piece) for piece in message["feed"]],
            decode=bool(message["decode"]),
            stop=bool(message["stop"]),
        )
