"""Settings of the runtime's verbs, as frozen dataclasses (filled from ``conf/serve.yaml`` and its siblings)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from runtime.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_TIMEOUT_S = 86400


@dataclass(frozen=True)
class Settings:
    """What all settings can do."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Take this class's keys out of a composed configuration."""
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})


@dataclass(frozen=True)
class EngineSettings(Settings):
    """How a plan is served.

    Attributes:
        model: overrides the plan's model (directory or hub id).
        weights: ``checkpoint``, or ``random`` for weights made up from the configuration alone.
        dtype: ``auto`` (the checkpoint's on GPUs, float32 on CPUs), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        exchange: ``allreduce`` or ``alltoall``; None takes the plan's.
        path: ``native`` (the project's own decoder), ``universal`` (Transformers' model with its experts replaced), or
            ``auto``: native where it serves the model, said in the log.
        cache_tokens: tokens whose keys and values the native path keeps room for; None takes what memory allows.
        max_sequences: the most sequences decoded together.
        max_prefill_tokens: the most prompt tokens fed in one step; longer prompts are fed in pieces, between which what
            runs goes on.
        max_waiting: requests that may wait; more are refused.
        prefix_cache: native path: whether prompts that begin alike share the pages of what they have in common.
        rank_timeout_s: a rank that does not answer for so long is lost.
    """

    model: str | None = None
    weights: str = "checkpoint"
    dtype: str = "auto"
    device: str = "auto"
    exchange: str | None = None
    path: str = "auto"
    cache_tokens: int | None = None
    max_sequences: int = 64
    max_prefill_tokens: int = 2048
    max_waiting: int = 1024
    prefix_cache: bool = True
    rank_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("weights", self.weights, ("checkpoint", "random")),
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("device", self.device, ("auto", "cpu", "cuda")),
            ("exchange", self.exchange, (None, "allreduce", "alltoall")),
            ("path", self.path, ("auto", "native", "universal")),
        ):
            if value not in allowed:
                raise ModelError(f"{name}={value}: expected one of {', '.join(map(str, allowed))}")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ModelError(
                f"model={self.model}: expected a directory or a hub id; write a number as model=./{self.model}"
            )
        if not isinstance(self.prefix_cache, bool):
            raise ModelError(f"prefix_cache={self.prefix_cache}: expected true or false")
        counts = [(name, getattr(self, name)) for name in ("max_sequences", "max_prefill_tokens", "max_waiting")]
        if self.cache_tokens is not None:
            counts.append(("cache_tokens", self.cache_tokens))
        for name, count in counts:
            if type(count) is not int or count < 1:
                raise ModelError(f"{name}={count}: expected an integer of at least 1")
        timeout = self.rank_timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 1 <= timeout <= MAX_TIMEOUT_S:
            raise ModelError(f"rank_timeout_s={timeout}: expected a number of seconds from 1 to {MAX_TIMEOUT_S}")

    def torch_dtype(self, device: torch.device) -> torch.dtype | str:
        """The dtype to load with on this device."""
        if self.dtype == "auto":
            return "auto" if device.type == "cuda" else torch.float32
        return DTYPES[self.dtype]
