"""Starting the other ranks of this host, and noticing when one dies."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import torch.distributed as dist

from runtime.distributed import RankAddress

logger = logging.getLogger(__name__)

POLL_S = 0.2
_LAUNCHED = "EXPERTPLAN_LAUNCHED"  # set for ranks whose standard input is a pipe that closes when rank 0 ends


def end_with_launcher() -> None:
    """In a rank started by `LocalRanks`: end when rank 0 says so, or at once when it is gone.

    A SIGTERM to the whole process group is rank 0's to handle: running requests get their time to end.
    """

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: it returns when the pipe closes
        os._exit(1)

    if _LAUNCHED in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


class LocalRanks:
    """Ranks 1 … N-1 as child processes that run the same command; this process is rank 0.

    Args:
        world_size: number of ranks N.
        arguments: the command line after ``python -m runtime`` (default: this process's own).

    Attributes:
        on_death: called once, from a thread, with a line that names the first rank that ended by itself. Ends this
            process until whoever runs an engine replaces it.
    """

    def __init__(self, world_size: int, arguments: Sequence[str] | None = None) -> None:
        self.address = RankAddress(0, world_size, 0, world_size)
        # The store listens before its port is told to anybody; all ranks, this one too, then connect to it as
        # torchrun's ranks connect to their agent's.
        self._store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # without a network the host's name may not resolve
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ending = threading.Event()
        self.on_death: Callable[[str], None] = self._abort
        command = [sys.executable, "-m", "runtime", *(sys.argv[1:] if arguments is None else arguments)]
        for rank in range(1, world_size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                _LAUNCHED: "1",
            }
            self._processes[rank] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)

        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def _watch(self) -> None:
        while not self._ending.wait(POLL_S):
            for rank, process in self._processes.items():
                code = process.poll()
                if code is not None and not self._ending.is_set():
                    self.on_death(f"rank {rank} {_describe_exit(code)}")
                    return

    def _abort(self, reason: str) -> None:
        """During start-up there is nothing to hand back: end at once instead of waiting in a collective."""
        logger.error("%s during start-up; its message stands above", reason)
        self.kill()
        os._exit(1)

    def wait(self, timeout_s: float) -> None:
        """Let the ranks end by themselves (after a stop plan), then end those that don't."""
        self._ending.set()
        for process in self._processes.values():
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                logger.warning("a rank did not stop within %g s and is killed", timeout_s)
                break
        self.kill()

    def kill(self) -> None:
        """End all ranks at once."""
        self._ending.set()
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait()


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
