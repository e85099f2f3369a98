"""Recording in production: the routes of a sample of the requests that rank 0 serves.

Whether a request is recorded is decided once, by a hash of its number; then all its tokens are, from prefill and
decode. Neither text nor, unless asked for, token ids are kept.

Shape legend: S tokens of a pass, R recorded ones, T tokens of a request, L MoE layers, K choices per token.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
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
from runtime.recording_settings import RecordSettings
from runtime.worker_interface import ModelFacts

MB = 10**6


@dataclass(frozen=True)
class Fed:
    """Tokens of one sequence in a pass.

    Attributes:
        sequence: its number.
        start: position of the first; None goes on where the pass before it ended.
        count: how many.
    """

    sequence: int
    start: int | None
    count: int


@dataclass
class _Open:
    """A recorded request that still runs; parallel lists, one entry per pass that is known.

    Routes are kept as bytes: small ones come from Python's own memory. Arrays of them, allocated between the tensors
    of a forward pass and kept for long, would leave gaps in which no later tensor fits.
    """

    next_start: int = 0  # of the next pass
    next_kept: int = 0  # positions before it are known
    experts: list[bytes] = field(default_factory=list)  # [tokens, L, K] each
    spans: list[tuple[int, int]] = field(default_factory=list)  # positions, from and to


@dataclass(frozen=True)
class _Pass:
    """Recorded tokens whose routes are on their way from the device, with the positions of their first ones."""

    fed: list[tuple[Fed, int]]
    experts_LRK: torch.Tensor
    copied: torch.cuda.Event | None

    def is_known(self) -> bool:
        return self.copied is None or bool(self.copied.query())


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
        self._passes: deque[_Pass] = deque()
        self._shape: tuple[int, ...] = ()  # L, K
        self._lock = threading.Lock()  # a lost rank ends requests from another thread than the engine's

    def keep(self, fed: Sequence[Fed], experts: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
        """Keep what a pass chooses; on a GPU the pass, and later ones, go on meanwhile.

        Args:
            fed: the pass's tokens; routes come in the same order.
            experts: of every MoE layer, integer ``[S, K]``; rows after those of ``fed`` are padding.
            weights: of every MoE layer, ``[S, K]``, to sort by: with a bias, routers choose in another order.
        """
        rows: list[int] = []
        chosen: list[tuple[Fed, int]] = []
        place = 0
        with self._lock:
            for tokens in fed:
                request = self._opened(tokens.sequence)
                if request is not None:
                    start = request.next_start if tokens.start is None else tokens.start
                    request.next_start = start + tokens.count
                    rows += range(place, place + tokens.count)
                    chosen.append((tokens, start))
                place += tokens.count
        if chosen:
            experts_LRK, copied = _copy_to_host(_select(rows, experts, weights))
            with self._lock:
                self._passes.append(_Pass(chosen, experts_LRK, copied))
                self._take_known()

    def _take_known(self) -> None:
        """Give the routes that have come to their requests; the lock is held, and nothing waits."""
        while self._passes and self._passes[0].is_known():
            known = self._passes.popleft()
            experts_RLK = known.experts_LRK.numpy().swapaxes(0, 1).astype(self._dtype)
            self._shape = experts_RLK.shape[1:]
            place = 0
            for tokens, start in known.fed:
                request = self._open.get(tokens.sequence)
                if request is not None:
                    again = min(tokens.count, max(0, request.next_kept - start))  # preempted, and fed once more
                    stop = start + tokens.count
                    request.experts.append(experts_RLK[place + again : place + tokens.count].tobytes())
                    request.spans.append((start + again, stop))
                    request.next_kept = max(request.next_kept, stop)
                place += tokens.count

    def end(self, sequence: int, tokens: Sequence[int], num_generated: int) -> None:
        """A request has ended, in whichever way: hand over what was fed of it, if it is recorded.

        Args:
            sequence: its number.
            tokens: of its prompt and then its answer; the answer's last one was not fed, or for nothing.
            num_generated: how many are its answer's.
        """
        with self._lock:
            self._take_known()
            request = self._open.pop(sequence, None)
        if request is None or not request.spans:
            return
        position = np.concatenate([np.arange(*span) for span in request.spans])
        experts = np.frombuffer(b"".join(request.experts), self._dtype).reshape(-1, *self._shape)
        fed = position < len(tokens) - (num_generated > 0)
        position, experts = position[fed], experts[fed]
        if len(position):
            # A token that was generated before a preemption may have been fed with its prompt: it counts as decoded.
            decode = position >= len(tokens) - num_generated
            token_ids = np.asarray(tokens)[position] if self._token_ids else None
            self._files.add(SequenceRoutes(experts, position, decode, token_ids))

    def close(self) -> None:
        """Finish the file under way; requests that are still open are lost."""
        self._files.close()

    def _opened(self, sequence: int) -> _Open | None:
        if sequence not in self._open:
            self._open[sequence] = _Open() if is_chosen(sequence, self._rate, self._seed) else None
        return self._open[sequence]


def _select(rows: Sequence[int], experts: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Experts of some of a pass's tokens by falling weight, int32 ``[L, R, K]``, without waiting for the device."""
    index_R = torch.tensor(rows, pin_memory=experts[0].is_cuda).to(experts[0].device, non_blocking=True)
    experts_LRK = torch.stack(list(experts))[:, index_R].to(torch.int32)
    weights_LRK = torch.stack(list(weights))[:, index_R].float()
    return experts_LRK.gather(2, weights_LRK.argsort(dim=2, descending=True, stable=True))


def _copy_to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what tells when it is there; None where it is now."""
    if not tensor.is_cuda:
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


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
