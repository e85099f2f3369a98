"""The traces of a recording on disk: files of bounded size, finished one after the other, the oldest removed.

A thread of its own writes, so that no step waits for a disk. A file appears when it is finished, whole; what a crash
loses is the file under way.
"""

from __future__ import annotations

import fcntl
import glob
import logging
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from profiler.trace_writer import TraceWriter
from runtime.errors import InputError

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
HEADER_BYTES = 1 << 16  # more than any header takes: model's name and layers


@dataclass(frozen=True)
class SequenceRoutes:
    """What is recorded of one request.

    Attributes:
        experts: integer ``[T, L, K]``, by falling weight.
        position: integer ``[T]``, rising.
        decode: bool ``[T]``.
        token_ids: integer ``[T]``, None where they are not recorded.
    """

    experts: np.ndarray
    position: np.ndarray
    decode: np.ndarray
    token_ids: np.ndarray | None


class TraceFiles:
    """Writes ``PATH-0001.safetensors`` and so on; numbers go on after those that are there.

    Args:
        path: the files' common part, with or without their suffix.
        open_writer: begins a trace at a path.
        token_bytes: that one token takes in a file.
        max_bytes: of a file; the next sequence begins another.
        max_age_s: after its first sequence a file is finished after so long.
        most_files: finished ones that are kept.

    Raises:
        InputError: the folder cannot be written, or another server records to the same path.
    """

    def __init__(
        self,
        path: Path,
        open_writer: Callable[[Path], TraceWriter],
        *,
        token_bytes: int,
        max_bytes: int,
        max_age_s: float,
        most_files: int,
    ) -> None:
        self._stem = path.with_name(path.name.removesuffix(SUFFIX))
        self._open_writer = open_writer
        self._max_tokens = (max_bytes - HEADER_BYTES) // token_bytes
        self._max_age_s, self._most_files = max_age_s, most_files
        self._lock = self._take_lock()
        self._remove_unfinished()
        self._number = max(self._finished(), default=0)
        self._writer: TraceWriter | None = None
        self._due_s = 0.0  # when the file under way is finished
        self._queue: queue.SimpleQueue[SequenceRoutes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()

    def add(self, routes: SequenceRoutes) -> None:
        """Hand a request's routes over to be written."""
        self._queue.put(routes)

    def close(self) -> None:
        """Write what was handed over and finish the file under way."""
        self._queue.put(None)
        self._thread.join()
        self._lock.close()

    def _take_lock(self) -> IO[bytes]:
        """Two servers would take each other's numbers and unfinished files."""
        path = self._stem.with_name(f".{self._stem.name}.lock")
        try:
            lock = path.open("wb")
        except OSError as error:
            raise InputError(
                f"record={self._stem}: {error.strerror}; name files in a folder you can write to"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise InputError(f"record={self._stem}: another server records there; name other files") from error
        return lock

    def _remove_unfinished(self) -> None:
        """Of a server that crashed."""
        for folder in self._stem.parent.glob(f".{glob.escape(self._stem.name)}-*{SUFFIX}.*.parts"):
            shutil.rmtree(folder, ignore_errors=True)

    def _finished(self) -> dict[int, Path]:
        """Finished files by number, rising."""
        name = re.compile(re.escape(self._stem.name) + r"-(\d+)" + re.escape(SUFFIX))
        found = [(name.fullmatch(path.name), path) for path in self._stem.parent.iterdir()]
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (routes := self._next()) is not None:
                self._write(routes)
            self._finish()
        except (InputError, OSError) as error:  # a full disk must not end the server
            logger.error("recording ends: %s", error)
            if self._writer is not None:
                self._writer.discard()
            while self._queue.get() is not None:
                pass

    def _next(self) -> SequenceRoutes | None:
        """What is written next; meanwhile the file under way grows old."""
        while self._writer is not None:
            try:
                return self._queue.get(timeout=max(0.0, self._due_s - time.monotonic()))
            except queue.Empty:
                self._finish()
        return self._queue.get()

    def _write(self, routes: SequenceRoutes) -> None:
        if self._writer is not None and self._writer.num_tokens + len(routes.position) > self._max_tokens:
            self._finish()
        if self._writer is None:
            self._number += 1
            self._writer = self._open_writer(self._stem.with_name(f"{self._stem.name}-{self._number:04d}{SUFFIX}"))
            self._due_s = time.monotonic() + self._max_age_s
        self._writer.add_sequence(
            routes.experts, decode=routes.decode, position=routes.position, token_ids=routes.token_ids
        )

    def _finish(self) -> None:
        if self._writer is None:
            return
        finished = list(self._finished().values())
        for path in finished[: max(0, len(finished) + 1 - self._most_files)]:
            path.unlink(missing_ok=True)
        writer, self._writer = self._writer, None
        writer.close()
        logger.info("recorded %d tokens of %d requests: %s", writer.num_tokens, writer.num_sequences, writer.path)
