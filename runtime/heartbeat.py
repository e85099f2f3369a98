"""Which ranks still live: each one counts up in the store through which the ranks met."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PERIOD_S = 0.5
PATIENCE_S = 2.0  # a rank that has not counted up for so long is silent
STORE_TIMEOUT_S = 5.0


class Heartbeat:
    """This rank's count, and a view on those of the others.

    Args:
        store: of all ranks; used by this object alone.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._store.set(_key(rank), "0")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    @staticmethod
    def start(rank: int, world_size: int) -> Heartbeat:
        """Over a connection of its own to the store that the environment names."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=STORE_TIMEOUT_S)
        return Heartbeat(dist.TCPStore(address, port, timeout=timeout), rank, world_size)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(PERIOD_S):
            count += 1
            try:
                with self._lock:
                    self._store.set(_key(self._rank), str(count))
            except RuntimeError:  # the store went with the rank that held it
                return

    def silent(self, sleep: Callable[[float], None] = time.sleep) -> list[int]:
        """Ranks that do not count up any more; takes `PATIENCE_S`."""
        before = self._counts()
        sleep(PATIENCE_S)
        return [rank for rank, count in self._counts().items() if count == before.get(rank)]

    def _counts(self) -> dict[int, bytes]:
        with self._lock:
            return {rank: self._store.get(_key(rank)) for rank in range(self._world_size) if rank != self._rank}

    def end(self) -> None:
        """Count no further."""
        self._ended.set()


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
