"""Settings of the command line, checked once, before any work is done."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profiler.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TraceSettings:
    """What ``python -m profiler trace`` runs; the defaults and meanings stand in ``conf/trace.yaml``."""

    model: str
    prompts: Path
    batch_size: int
    max_new_tokens: int
    max_prompt_tokens: int | None
    limit: int | None
    temperature: float
    seed: int
    dtype: str
    device: str
    weights: bool
    token_ids: bool
    gate_ahead: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TraceSettings:
        """Check the composed configuration.

        Raises:
            InputError: a value has the wrong type or is out of range.
        """
        dtype, device, temperature = values["dtype"], values["device"], values["temperature"]
        if dtype not in DTYPES:
            raise InputError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
        if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise InputError(f"device={device}: expected auto, cpu, cuda or cuda:N")
        is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not is_number or not math.isfinite(temperature) or temperature < 0:
            raise InputError(f"temperature={temperature}: expected a number >= 0")
        for name in ("weights", "token_ids", "gate_ahead"):
            if not isinstance(values[name], bool):
                raise InputError(f"{name}={values[name]}: expected true or false")
        return cls(
            model=os.path.expanduser(str(values["model"])),
            prompts=Path(str(values["prompts"])).expanduser(),
            batch_size=_whole_number(values, "batch_size", 1),
            max_new_tokens=_whole_number(values, "max_new_tokens", 1),
            max_prompt_tokens=_optional_whole_number(values, "max_prompt_tokens", 1),
            limit=_optional_whole_number(values, "limit", 1),
            temperature=float(temperature),
            seed=_whole_number(values, "seed", 0, most=2**63 - 1),
            dtype=dtype,
            device=device,
            weights=values["weights"],
            token_ids=values["token_ids"],
            gate_ahead=values["gate_ahead"],
        )


def _whole_number(values: Mapping[str, Any], name: str, least: int, most: int | None = None) -> int:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}={value}: expected a whole number >= {least}")
    if most is not None and value > most:
        raise InputError(f"{name}={value}: expected a whole number <= {most}")
    return value


def _optional_whole_number(values: Mapping[str, Any], name: str, least: int) -> int | None:
    return None if values[name] is None else _whole_number(values, name, least)
