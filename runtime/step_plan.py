"""What rank 0 tells every rank to do next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.requests import SamplingParameters


@dataclass(frozen=True)
class Admission:
    """A sequence that starts.

    Attributes:
        sequence: its number, unique over the run.
        tokens: the prompt's token ids.
        home: the rank that samples it (and, in ``alltoall``, that alone holds its cache).
        sampling: of its tokens; the seed is a number.
        new_tokens: the most that will be generated, for which the native path keeps room.
        generated: how many of ``tokens``, at their end, the sequence generated before it was preempted.
    """

    sequence: int
    tokens: list[int]
    home: int
    sampling: SamplingParameters
    new_tokens: int = 1
    generated: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One step of all ranks: first retire, then prefill what is admitted, else decode what runs, else nothing.

    Attributes:
        retire: sequences that ended.
        admit: sequences to prefill together; decoding pauses for this step.
        stop: leave the loop.
    """

    retire: list[int] = field(default_factory=list)
    admit: list[Admission] = field(default_factory=list)
    stop: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain lists and dictionaries."""
        return asdict(self)

    @staticmethod
    def from_json(message: Mapping[str, Any]) -> StepPlan:
        """Back from `to_json`."""
        admissions = [
            Admission(**admission | {"sampling": SamplingParameters(**admission["sampling"])})
            for admission in message["admit"]
        ]
        return StepPlan(list(message["retire"]), admissions, bool(message["stop"]))
