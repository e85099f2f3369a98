"""How long the exchange of hidden states takes between this run's ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from runtime.distributed import RankGroup

ROWS = (1, 4, 16, 64, 256, 1024)
WARM_UP, SAMPLES = 3, 15


@dataclass(frozen=True)
class ExchangeTime:
    """One collective: which, what its slowest port carries (2 · bytes for an all-reduce), and its time in µs."""

    name: str
    carried_bytes: int
    us: float


def time_exchange(group: RankGroup, width: int, dtype: torch.dtype) -> list[ExchangeTime]:
    """Time the collectives of both exchange modes over all ranks, with hidden states ``[rows, width]``.

    Every rank calls this, and gets its own times.
    """
    found = []
    for rows in ROWS:
        hidden = torch.zeros((rows * group.world_size, width), dtype=dtype, device=group.device)
        reduced = hidden[:rows].float()  # shares of ranks are summed in float32
        us = _median_us(group, partial(group.all_reduce, reduced))
        found.append(ExchangeTime("allreduce", 2 * reduced.nbytes, us))
        counts = [rows] * group.world_size
        us = _median_us(group, partial(group.all_to_all, hidden, counts, counts))
        found.append(ExchangeTime("alltoall", rows * (group.world_size - 1) * width * dtype.itemsize, us))
    return found


def _median_us(group: RankGroup, call: Callable[[], object]) -> float:
    """Median time until the call's result is there."""
    times = []
    for number in range(WARM_UP + SAMPLES):
        group.gather_tokens(torch.zeros(1, dtype=torch.int64))  # the ranks begin together
        start_s = time.perf_counter()
        call()
        if group.device.type == "cuda":
            torch.cuda.synchronize(group.device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start_s)
    return 1e6 * sorted(times)[len(times) // 2]
