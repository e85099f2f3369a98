"""The tokens of a step on their way to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from runtime.native.rows import RunningSequence


class NewTokens:
    """Copied from the device as soon as the step has them, while the host goes on.

    Args:
        sequences: that get a token, by number.
        sampled: their tokens, int64 tensors one after the other; later steps may overwrite them.
        device: of the step.
    """

    def __init__(
        self, sequences: Mapping[int, RunningSequence], sampled: Sequence[torch.Tensor], device: torch.device
    ) -> None:
        self._sequences = sequences
        self._known: dict[int, int] | None = None
        self._copied: torch.cuda.Event | None = None
        on_gpu = device.type == "cuda"
        self._host = torch.empty(len(sequences), dtype=torch.int64, pin_memory=on_gpu)
        if sampled:
            self._host.copy_(torch.cat(list(sampled)) if len(sampled) > 1 else sampled[0], non_blocking=True)
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def __call__(self) -> dict[int, int]:
        """Wait until the step is done; every sequence then knows its own token."""
        if self._known is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._known = dict(zip(self._sequences, self._host.tolist(), strict=True))
            for sequence, token in zip(self._sequences.values(), self._known.values(), strict=True):
                sequence.token = token
        return self._known
