"""Recording in production: the routes of a sample of the requests that rank 0 serves.

Whether a request is recorded is decided once, by a hash of its number; then all its tokens are, from prefill and
decode. Neither text nor, unless asked for, token ids are kept.

Shape legend: S tokens of a pass, R recorded ones, T tokens of a request, L MoE layers, K choices per token.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from placement.plan import PlacementPlan
from profiler.fingerprint import model_fingerprint
from profiler.trace_header import require_output
from profiler.trace_writer import TraceWriter
from runtime.errors import InputError
from runtime.recording_files import HEADER_BYTES, SUFFIX, SequenceRoutes, TraceFiles
from runtime.settings import RecordSettings
from runtime.worker_interface import ModelFacts

MB = 10**6


@dataclass(frozen=True)
class Fed:
    """Tokens of one sequence in a pass.

    Attributes:
        sequence: its number.
        tokens: ids, in order.
        decode: whether a decode step fed them.
        start: position of the first; None goes on where the pass before it ended.
    """

    sequence: int
    tokens: Sequence[int]
    decode: bool
    start: int | None = None


@dataclass
class _Open:
    """A recorded request that still runs; parallel lists, one entry per pass."""

    next_position: int = 0
    experts: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    decode: list[np.ndarray] = field(default_factory=list)
    token_ids: list[np.ndarray] = field(default_factory=list)


class RouteRecording:
    """Collects routes pass by pass, and hands every request's over when it ends.

    Args:
        files: take the requests.
        num_experts: E.
        rate: share of requests that are recorded, in (0, 1].
        seed: of the choice.
        token_ids: whether to keep the ids of the tokens that were fed.
    """

    def __init__(self, files: TraceFiles, num_experts: int, rate: float, seed: int, token_ids: bool) -> None:
        self._files, self._rate, self._seed, self._token_ids = files, rate, seed, token_ids
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._open: dict[int, _Open | None] = {}  # None: not recorded
        self._lock = threading.Lock()  # a lost rank ends the recording from another thread than the engine's

    def wants(self, fed: Sequence[Fed]) -> bool:
        """Whether a pass has any token to record."""
        return any(self._opened(tokens.sequence) is not None for tokens in fed)

    def note(self, fed: Sequence[Fed], experts: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None) -> None:
        """Keep what a pass chose.

        Args:
            fed: the pass's tokens; routes come in the same order.
            experts: of every MoE layer, integer ``[S, K]``; rows after those of ``fed`` are padding.
            weights: of every MoE layer, ``[S, K]``, to sort by; None where experts come by falling weight.
        """
        if not self.wants(fed):
            return
        rows: list[int] = []
        place = 0
        for tokens in fed:
            if self._opened(tokens.sequence) is not None:
                rows += range(place, place + len(tokens.tokens))
            place += len(tokens.tokens)
        index_R = torch.tensor(rows, device=experts[0].device)
        experts_LRK = torch.stack(list(experts))[:, index_R]
        if weights is not None:
            weights_LRK = torch.stack(list(weights))[:, index_R].float()
            order_LRK = weights_LRK.argsort(dim=2, descending=True, stable=True)
            experts_LRK = experts_LRK.gather(2, order_LRK)
        experts_RLK = experts_LRK.to(torch.int32).cpu().numpy().swapaxes(0, 1).astype(self._dtype)
        with self._lock:
            self._keep(fed, experts_RLK)

    def _keep(self, fed: Sequence[Fed], experts_RLK: np.ndarray) -> None:
        place = 0
        for tokens in fed:
            kept = self._open.get(tokens.sequence)
            if kept is None:
                continue
            count = len(tokens.tokens)
            start = kept.next_position if tokens.start is None else tokens.start
            again = min(count, max(0, kept.next_position - start))  # of a sequence that was preempted and starts over
            kept.experts.append(experts_RLK[place + again : place + count])
            kept.positions.append(np.arange(start + again, start + count))
            kept.decode.append(np.full(count - again, tokens.decode))
            if self._token_ids:
                kept.token_ids.append(np.asarray(tokens.tokens[again:]))
            kept.next_position = max(kept.next_position, start + count)
            place += count

    def end(self, sequences: Sequence[int]) -> None:
        """Requests have ended, in whichever way: hand over what was fed of those that are recorded."""
        with self._lock:
            for sequence in sequences:
                kept = self._open.pop(sequence, None)
                if kept is not None and kept.next_position:
                    self._files.add(
                        SequenceRoutes(
                            np.concatenate(kept.experts),
                            np.concatenate(kept.positions),
                            np.concatenate(kept.decode),
                            np.concatenate(kept.token_ids) if self._token_ids else None,
                        )
                    )

    def close(self) -> None:
        """End all open requests and finish the file under way."""
        self.end(sorted(self._open))
        self._files.close()

    def _opened(self, sequence: int) -> _Open | None:
        if sequence not in self._open:
            self._open[sequence] = _Open() if is_chosen(sequence, self._rate, self._seed) else None
        return self._open[sequence]


def is_chosen(sequence: int, rate: float, seed: int) -> bool:
    """Whether the request of this number is among the share ``rate`` of all."""
    digest = hashlib.blake2b(f"{seed} {sequence}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


def check_output(settings: RecordSettings) -> None:
    """Refuse files that could not be written, before a model is loaded.

    Raises:
        InputError: their folder does not exist or is read-only, or their name is too long.
    """
    if settings.record is not None:
        require_output(Path(f"{Path(settings.record).expanduser()}-0001{SUFFIX}"))


def start_recording(settings: RecordSettings, plan: PlacementPlan, model: str, facts: ModelFacts) -> RouteRecording:
    """A recording of the loaded model's routes.

    Raises:
        InputError: the files cannot be written, or one of them could not hold a request of the longest context.
    """
    assert settings.record is not None
    id_bytes = 1 if plan.num_experts <= 256 else 2
    token_bytes = len(plan.layer_ids) * plan.top_k * id_bytes + 9 + (4 if settings.record_token_ids else 0)
    needed = facts.max_context * token_bytes + HEADER_BYTES
    if settings.record_max_mb * MB < needed:
        raise InputError(
            f"record_max_mb={settings.record_max_mb}: a request of {facts.max_context} tokens takes "
            f"{needed / MB:.1f} MB; give at least {-(-needed // MB)}"
        )
    open_writer = partial(
        TraceWriter,
        model=os.path.abspath(model) if os.path.isdir(model) else model,
        num_experts=plan.num_experts,
        layer_ids=plan.layer_ids,
        top_k=plan.top_k,
        weights=False,
        token_ids=settings.record_token_ids,
        model_fingerprint=model_fingerprint(model),
        expert_bytes=facts.expert_bytes,
        source=f"served requests, a share of {settings.record_rate:g}",
    )
    files = TraceFiles(
        Path(settings.record).expanduser(),
        open_writer,
        token_bytes=token_bytes,
        max_bytes=int(settings.record_max_mb * MB),
        max_age_s=settings.record_minutes * 60,
        most_files=settings.record_rotate,
    )
    return RouteRecording(
        files, plan.num_experts, settings.record_rate, settings.record_seed, settings.record_token_ids
    )
