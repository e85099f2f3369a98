"""`python -m runtime serve` as a process of its own, with all the ranks that it starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai

PROJECT = Path(__file__).resolve().parents[2]
START_UP_S = 120
END_S = 15


class ServeProcess:
    """A server and all it starts, in a process group of its own."""

    def __init__(self, log: Path, *arguments: str, python: tuple[str, ...] = ("-m", "runtime")) -> None:
        self._log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as stderr:
            command = [sys.executable, *python, *arguments]
            self.process = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stderr=stderr, stdout=stderr, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> str:
        """The URL, once it serves."""
        deadline = time.monotonic() + START_UP_S
        while time.monotonic() < deadline:
            found = re.search(r"serving .* on (http://[^\s\"]+)", self.log)
            if found:
                return found[1]
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        raise TimeoutError(self.log)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.wait_ready()}/v1", api_key="none", max_retries=0, timeout=60)

    def members(self) -> dict[int, str]:
        """Living processes of the group, by id, with the start of their environment's rank ("" for rank 0)."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
                    found[int(folder.name)] = rank[1].decode() if rank else ""
        return found

    def pid_of(self, rank: int) -> int:
        [pid] = [pid for pid, found in self.members().items() if found == str(rank)]
        return pid

    def wait_gone(self, seconds: float = END_S) -> None:
        """Fail if a process of the group is still there after so long."""
        deadline = time.monotonic() + seconds
        while self.members():
            assert time.monotonic() < deadline, f"still running: {self.members()}\n{self.log}"
            time.sleep(0.05)

    def error_lines(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("error:")]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
