"""The tokens of a step, and their log-probabilities, on their way to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.logprobs import read_rows
from runtime.native.rows import RunningSequence
from runtime.requests import TokenLogprobs


class NewTokens:
    """Copied from the device as soon as the step has them, while the host goes on.

    Args:
        device: of the step.

    Attributes:
        logprobs: by sequence, of those that asked for them; once the tokens are known.
    """

    def __init__(self, device: torch.device) -> None:
        self.logprobs: dict[int, TokenLogprobs] = {}
        self._on_gpu = device.type == "cuda"
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
