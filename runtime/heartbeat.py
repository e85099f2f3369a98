"""Which ranks still live: each one counts up in the store through which the ranks met."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PERIOD_S = 0.5
PATIENCE_S = 1.6  # a rank that has not counted up for so long is silent
STORE_TIMEOUT_S = 5.0


class Heartbeat:
    """This rank's count, and on rank 0 the time since which each other rank's stands still.

    Args:
        store: of all ranks; used by this object's thread alone.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank = store, rank
        self._ended = threading.Event()
        watched = range(1, world_size) if rank == 0 else ()
        self._seen = {other: (b"", time.monotonic()) for other in watched}
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @staticmethod
    def start(rank: int, world_size: int) -> Heartbeat:
        """Over a connection of its own to the store that the environment names."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        return Heartbeat(dist.TCPStore(address, port, timeout=timeout), rank, world_size)

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            try:
                self._store.set(_key(self._rank), str(beats))
                for other, (before, _) in self._seen.items():
                    count = self._store.get(_key(other))
                    if count != before:
                        self._seen[other] = (count, time.monotonic())
            except RuntimeError:  # the store went with the rank that held it
                return
            if self._ended.wait(PERIOD_S):
                return

    def silent(self) -> list[int]:
        """Ranks that have not counted up lately; known to rank 0."""
        now = time.monotonic()
        return [rank for rank, (_, since_s) in self._seen.items() if now - since_s > PATIENCE_S]

    def end(self) -> None:
        """Count no further."""
        self._ended.set()


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
