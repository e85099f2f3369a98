"""The ranks of one run: their device, their process groups, and the collectives the runtime uses."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from runtime.errors import InputError, ModelError, one_line
from runtime.heartbeat import Heartbeat

MESSAGE_BYTES = 16384  # a step's plan nearly always fits, so one broadcast carries it
TEXT_BYTES = 2048
START_UP_TIMEOUT_S = 3600.0  # ranks import and load at different speeds; one that dies is noticed by who started it


class FailedElsewhereError(Exception):
    """What this rank did went well, but another rank failed, and will say why."""


@dataclass(frozen=True)
class RankAddress:
    """Where this process stands among the ranks (torchrun's variables, or the local launcher's)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> RankAddress | None:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; None where no RANK is set.

        Raises:
            ModelError: another one is missing, or one is no number.
        """
        if "RANK" not in os.environ:
            return None
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            return RankAddress(
                rank=rank,
                world_size=world_size,
                local_rank=int(os.environ.get("LOCAL_RANK", rank)),
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            )
        except (KeyError, ValueError) as error:
            raise ModelError(
                f"RANK={os.environ['RANK']}: no address among ranks ({one_line(error)}); use torchrun, or unset RANK"
            ) from error


def end_process(rank: int, reason: str) -> None:
    """End this rank at once: leaving the group in order would wait for other ranks, which may wait for this one."""
    print(f"error: rank {rank} stopped: {reason}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


class RankGroup:
    """All ranks of a run. Tensors go over NCCL on GPUs and gloo on CPUs; plans and tokens always over gloo.

    Where several ranks share one GPU, NCCL refuses them: ``backend="gloo"`` then carries the tensors through host
    memory (slow; for functional runs).

    Args:
        address: of this rank.
        device: of this rank.
        backend: ``nccl`` or ``gloo``, for the tensors.
        timeout_s: from `end_start_up` on, a rank that does not answer for so long is lost.
    """

    def __init__(self, address: RankAddress, device: torch.device, backend: str, timeout_s: float) -> None:
        self.rank, self.world_size = address.rank, address.world_size
        self.one_host = address.local_world_size == address.world_size
        self.device, self.backend = device, backend
        self._timeout = timedelta(seconds=timeout_s)
        timeout = timedelta(seconds=START_UP_TIMEOUT_S)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method="env://",
            rank=address.rank,
            world_size=address.world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
        self.control: Any = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else dist.group.WORLD
        self._through_host = backend == "gloo" and device.type == "cuda"
        self._heartbeat: Heartbeat | None = None
        self._message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)

    @property
    def process_group(self) -> Any:
        """Of all ranks, for tensors."""
        return dist.group.WORLD

    def end_start_up(self) -> None:
        """From now on every rank must answer within the timeout."""
        for group in {dist.group.WORLD, self.control}:
            _set_pg_timeout(self._timeout, group)
        if self.world_size > 1:
            self._heartbeat = Heartbeat.start(self.rank, self.world_size)

    def describe_silent(self) -> str:
        """Which ranks rank 0 hears no more of, as ``rank 1 does not answer``; empty where there are none."""
        silent = [] if self._heartbeat is None else self._heartbeat.silent()
        if not silent:
            return ""
        several = len(silent) > 1
        return f"rank{'s' * several} {', '.join(map(str, silent))} {'do' if several else 'does'} not answer"

    def close(self) -> None:
        """Leave the group; collectives fail afterwards."""
        if self._heartbeat is not None:
            self._heartbeat.end()
        if dist.is_initialized():
            dist.destroy_process_group()
        self.control = None  # a group that lives until the interpreter ends aborts the process: its threads still run

    # --- tensors -------------------------------------------------------------------------------------------------

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cpu() if self._through_host else tensor

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's tensor (same shape and dtype on all); the same bits on every rank."""
        staged = self._host(tensor)
        dist.all_reduce(staged)
        return staged.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Rank ``source``'s tensor on every rank; the others pass a tensor of the same shape and dtype."""
        staged = self._host(tensor)
        dist.broadcast(staged, source)
        return staged.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (same shape on all) stacked along a new first dimension ``[ranks, …]``."""
        staged = self._host(tensor.contiguous())
        gathered = staged.new_empty((self.world_size, *staged.shape))
        if self.backend == "nccl":  # without copies, so that graphs can capture it
            dist.all_gather_into_tensor(gathered, staged)
        else:
            dist.all_gather(list(gathered), staged)
        return gathered.to(tensor.device)

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> torch.Tensor:
        """Send rows ``[sum(send_counts), D]``, ordered by destination; get ``[sum(receive_counts), D]`` by source."""
        staged = self._host(rows.contiguous())
        received = staged.new_empty((sum(receive_counts), *rows.shape[1:]))
        dist.all_to_all_single(received, staged, list(receive_counts), list(send_counts))
        return received.to(rows.device)

    # --- control -------------------------------------------------------------------------------------------------

    def broadcast_json(self, message: Any = None) -> Any:
        """Send rank 0's JSON-serialisable message to every rank; the others pass nothing and receive it."""
        if self.world_size == 1:
            return message
        header = 8
        payload = b""
        if self.rank == 0:
            payload = json.dumps(message, separators=(",", ":")).encode()
            self._message[:header] = torch.tensor([len(payload)], dtype=torch.int64).view(torch.uint8)
            first = torch.frombuffer(bytearray(payload[: MESSAGE_BYTES - header]), dtype=torch.uint8)
            self._message[header : header + len(first)] = first
        dist.broadcast(self._message, 0, group=self.control)
        length = int(self._message[:header].view(torch.int64).item())
        first_bytes = self._message[header : header + min(length, MESSAGE_BYTES - header)]
        rest = torch.empty(max(0, length - (MESSAGE_BYTES - header)), dtype=torch.uint8)
        if len(rest):
            if self.rank == 0:
                rest.copy_(torch.frombuffer(bytearray(payload[MESSAGE_BYTES - header :]), dtype=torch.uint8))
            dist.broadcast(rest, 0, group=self.control)
        return json.loads(bytes(first_bytes.tolist()) + bytes(rest.tolist()))

    def gather_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every rank's int64 ``[N]`` host tensor (same N) as ``[ranks, N]`` on every rank."""
        if self.world_size == 1:
            return tokens[None]
        gathered = tokens.new_empty((self.world_size, len(tokens)))
        dist.all_gather(list(gathered), tokens, group=self.control)
        return gathered

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, cut off after `TEXT_BYTES` bytes."""
        row = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        data = bytearray(text.encode()[:TEXT_BYTES])
        if data:
            row[: len(data)] = torch.frombuffer(data, dtype=torch.uint8)
        rows = self.gather_tokens(row)
        return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this when all ranks are through: one that failed alone would meet the others in another collective.

        Raises:
            FailedElsewhereError: on ranks whose own work went well, where another's ended with an error in the input or
                for want of memory.
        """
        try:
            yield
        except (InputError, FailedElsewhereError, torch.OutOfMemoryError):
            self.gather_tokens(torch.tensor([1]))
            raise
        if self.gather_tokens(torch.tensor([0])).any():
            raise FailedElsewhereError("another rank failed")

    def broadcast_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rank 0's int64 ``[N]`` host tensor on every rank."""
        if self.world_size > 1:
            dist.broadcast(tokens, 0, group=self.control)
        return tokens


def choose_device(name: str, address: RankAddress) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into this rank's device.

    ``auto`` takes GPUs where there is one for every local rank. Explicit ``cuda`` lets ranks share GPUs.

    Raises:
        ModelError: ``cuda`` was asked for and there is none.
    """
    gpus = torch.cuda.device_count()
    if name == "cuda" and gpus == 0:
        raise ModelError("device=cuda: no NVIDIA GPU is visible; use device=cpu or device=auto")
    if name == "cuda" or (name == "auto" and gpus >= address.local_world_size):
        return torch.device("cuda", address.local_rank % gpus)
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    raise ModelError(f"device={name}: expected auto, cpu or cuda")


def choose_backend(device: torch.device, address: RankAddress) -> str:
    """NCCL where every local rank has a GPU of its own, else gloo."""
    return "nccl" if device.type == "cuda" and torch.cuda.device_count() >= address.local_world_size else "gloo"
