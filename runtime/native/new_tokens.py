"""The tokens of a step, and their log-probabilities, on their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from runtime.logprobs import read_rows
from runtime.native.rows import RunningSequence
from runtime.requests import TokenLogprobs

Gather = Callable[[torch.Tensor], torch.Tensor]


class NewTokens:
    """Copied from the device as soon as the step has them, while the host goes on.

    Args:
        device: of the step.

    Attributes:
        logprobs: by sequence, of those that asked for them; once the tokens are known.
    """

    def __init__(self, device: torch.device) -> None:
        self.logprobs: dict[int, TokenLogprobs] = {}
        self._device, self._on_gpu = device, device.type == "cuda"
        self._sequences: dict[int, RunningSequence] = {}
        self._sampled: list[torch.Tensor] = []
        self._asking: list[tuple[Sequence[int], torch.Tensor]] = []
        self._known: dict[int, int] | None = None
        self._copied: torch.cuda.Event | None = None

    def add(
        self,
        sequences: Mapping[int, RunningSequence],
        sampled: torch.Tensor,
        asking: Sequence[int],
        logprob_rows: torch.Tensor | None,
    ) -> None:
        """Add tokens of sequences, int64 ``[B]``, and what `Sampler.take_in` gave; later steps may overwrite them."""
        self._sequences |= sequences
        self._sampled.append(sampled)
        if logprob_rows is not None:
            self._asking.append((asking, logprob_rows))

    def share(self, members: Sequence[Mapping[int, RunningSequence]], vocabulary: int, gather: Gather) -> None:
        """Make the tokens of every rank known to all; nothing but `copy` follows.

        Args:
            members: the sequences that get a token, by rank, in the order in which that rank added them.
            vocabulary: number of token ids.
            gather: every rank's rows ``[T, N]`` on every rank, ``[G, T, N]``.
        """
        asking = [[n for n, each in held.items() if each.sampling.logprobs is not None] for held in members]
        most = max(map(len, members))
        mine = torch.zeros((most, 1), dtype=torch.int64, device=self._device)
        if self._sampled:
            own = torch.cat(self._sampled)
            mine[: len(own), 0] = own
        gathered = gather(mine)
        self._sampled = [held_tokens[: len(held), 0] for held_tokens, held in zip(gathered, members, strict=True)]
        self._sequences = {number: each for held in members for number, each in held.items()}
        if not any(asking):
            return
        wanted = max(each.sampling.logprobs or 0 for each in self._sequences.values())
        size = max(map(len, asking)), 2 + 2 * min(wanted, vocabulary)
        rows = torch.zeros(size, dtype=torch.float64, device=self._device)
        place = 0
        for numbers, found in self._asking:
            rows[place : place + len(numbers), : found.shape[1]] = found
            place += len(numbers)
        everyones = gather(rows)
        self._asking = [
            (numbers, each[: len(numbers)]) for numbers, each in zip(asking, everyones, strict=True) if numbers
        ]

    def copy(self) -> None:
        """Begin to copy; nothing is added after that."""
        self._sampled = [self._to_host(torch.cat(self._sampled))] if self._sampled else []
        self._asking = [(asking, self._to_host(rows)) for asking, rows in self._asking]
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._on_gpu)
        return host.copy_(tensor, non_blocking=True)

    def __call__(self) -> dict[int, int]:
        """Wait until the step is done; every sequence then knows its own token."""
        if self._known is None:
            if self._copied is not None:
                self._copied.synchronize()
            tokens = self._sampled[0].tolist() if self._sampled else []
            self._known = dict(zip(self._sequences, tokens, strict=True))
            for sequence, token in zip(self._sequences.values(), self._known.values(), strict=True):
                sequence.token = token
            for asking, rows in self._asking:
                self.logprobs |= read_rows(asking, rows)
        return self._known
