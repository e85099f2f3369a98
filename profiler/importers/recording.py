"""What every importer gets and gives: the model's facts, and routes or counts by MoE layer and logical expert.

Shape suffixes: T tokens, L MoE layers, E logical experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from profiler.errors import InputError


class RecordingError(InputError):
    """A recording that is missing, damaged, of another kind or of another model."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model beside the recording; None where nobody said.

    Attributes:
        model: hub id or path.
        num_experts: logical experts per layer (E).
        top_k: experts per token (K).
        layer_ids: decoder layers that are MoE, rising.
        num_layers: decoder layers, dense ones included.
        model_fingerprint, expert_bytes: as in a trace.
    """

    model: str
    num_experts: int | None = None
    top_k: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_layers: int | None = None
    model_fingerprint: str | None = None
    expert_bytes: int | None = None

    def agree(self, name: str, found: int, where: str) -> int:
        """A number that the recording tells, refused where the model has another.

        Args:
            name: ``num_experts`` or ``top_k``.
            found: what the recording has.
            where: file, for the message.

        Raises:
            RecordingError: they differ.
        """
        known = getattr(self, name)
        if known is not None and known != found:
            raise RecordingError(
                f"{where}: {name} is {found}, {self.model} has {known}: a recording of another model; name its own"
            )
        return found


@dataclass
class Remarks:
    """What an import left out or took for granted, for the summary."""

    _counts: dict[str, int] = field(default_factory=dict)
    _lines: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a number of things that were left out, such as tokens of padding."""
        if number:
            self._counts[what] = self._counts.get(what, 0) + number

    def say(self, line: str) -> None:
        """Say something once."""
        if line not in self._lines:
            self._lines.append(line)

    def lines(self) -> list[str]:
        """Everything, for printing."""
        return [*(f"{what}: {number:,}" for what, number in self._counts.items()), *self._lines]


@dataclass(frozen=True)
class RecordedSequence:
    """The tokens of one request, or of what is known to belong together.

    Attributes:
        experts: integer ``[T, L, K]``, logical ids in the engine's order.
        position: integer ``[T]``, rising.
        decode: bool ``[T]``, True where the token was fed in a decode step.
        token_ids: integer ``[T]``, or None where the recording has none.
        domain: of the request, or None.
    """

    experts: np.ndarray
    position: np.ndarray
    decode: np.ndarray
    token_ids: np.ndarray | None = None
    domain: str | None = None


@dataclass(frozen=True)
class RecordedRoutes:
    """A recording that tells every token's experts.

    Attributes:
        num_experts: E.
        top_k: K.
        layer_ids: decoder layers of ``experts``' second dimension.
        token_ids: whether every sequence has token ids.
        sequences: in the order they are to be written; read while they are iterated, so errors may come late.
    """

    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    token_ids: bool
    sequences: Iterable[RecordedSequence]


@dataclass(frozen=True)
class RecordedCounts:
    """A recording that tells how many tokens each expert got.

    Attributes:
        layer_ids: decoder layers of the rows.
        counts: int64 ``[L, E]``.
    """

    layer_ids: tuple[int, ...]
    counts: np.ndarray


def routes_of(
    sequences: Iterator[RecordedSequence], num_experts: int, layer_ids: tuple[int, ...], where: str
) -> RecordedRoutes:
    """Routes whose K and columns are those of the first sequence.

    Raises:
        RecordingError: there is no sequence at all.
    """
    first = next(sequences, None)
    if first is None:
        raise RecordingError(f"{where}: holds no routes of any token; record while requests are served")
    return RecordedRoutes(
        num_experts, first.experts.shape[2], layer_ids, first.token_ids is not None, chain([first], sequences)
    )
