"""Rank processes that are kept between tests: real processes, joined over gloo, that run one job after another."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from runtime.requests import SamplingParameters, TokenEvent, TokenLogprobs
from tests.support.schedules import Arrival

TIMEOUT_S = 120


@dataclass(frozen=True)
class Job:
    """A model to load by a plan, and prompts to continue.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it.
        exchange: mode.
        prompts: token ids.
        arrivals: the step at which each prompt is admitted.
        new_tokens: generated for each prompt.
        dtype: name of the torch dtype.
        random_weights: draw the weights instead of reading them.
        sampling: of each prompt, resolved; None is greedy.
        record: path of the traces that rank 0 records of every prompt, with token ids.
    """

    model: str
    plan: dict[str, Any]
    exchange: str
    prompts: list[list[int]]
    arrivals: list[int]
    new_tokens: int
    dtype: str = "float32"
    random_weights: bool = False
    record: str | None = None
    sampling: list[SamplingParameters] | None = None

    def run(self, group: Any) -> Result:
        """Execute this in one of the ranks, on the universal path."""
        return _run_job(self, group)


@dataclass(frozen=True)
class EngineJob:
    """A model to load by a plan, and requests for an engine.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it.
        exchange: mode.
        schedule: of requests; the result's tokens are numbered by it.
        settings: of the engine.
    """

    model: str
    plan: dict[str, Any]
    exchange: str
    schedule: tuple[Arrival, ...]
    settings: dict[str, Any]

    def run(self, group: Any) -> Result:
        """Execute this in one of the ranks."""
        return _run_engine(self, group)


@dataclass
class Result:
    """What a rank found; tokens and logits are those it sampled itself.

    Attributes:
        tokens: generated ids per prompt.
        logits: float32 ``[new_tokens, V]`` per prompt.
        logprobs: of the tokens, per prompt, where they were asked for; complete on rank 0.
        routes: per layer index, the ids ``[T, K]`` of all forward passes in order.
        expert_parameter_bytes: of the experts modules after loading.
        expert_bytes_read: from the checkpoint.
        events: of every request of an engine's schedule.
        pieces: of prompts in every plan of the engine.
        load: of all slots, on the rank that knows it.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logits: dict[int, list[np.ndarray]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    routes: dict[int, list[np.ndarray]] = field(default_factory=dict)
    expert_parameter_bytes: int = 0
    expert_bytes_read: int = 0
    events: list[list[TokenEvent]] = field(default_factory=list)
    pieces: list[int] = field(default_factory=list)
    load: Any = None


class RankPool:
    """``world_size`` processes that execute the same job together, on CPUs over gloo or on GPUs over NCCL."""

    def __init__(self, world_size: int, device: str = "cpu") -> None:
        self.world_size = world_size
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, self._store.port, device, theirs)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Any) -> list[Any]:
        """Execute a `Job` or another of its kind; every rank's result, or the first rank's traceback as an error."""
        for pipe in self._pipes:
            pipe.send(job)
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {TIMEOUT_S} s")
            result = pipe.recv()
            if isinstance(result, str):
                raise RuntimeError(f"rank {rank} failed:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _rank_main(rank: int, world_size: int, port: int, device: str, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    from transformers.utils import logging

    from runtime.distributed import RankAddress, RankGroup, choose_backend, choose_device

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    address = RankAddress.from_environment()
    assert address is not None
    chosen = choose_device(device, address)
    group = RankGroup(address, chosen, choose_backend(chosen, address), TIMEOUT_S)
    while True:
        job = pipe.recv()
        try:
            pipe.send(job.run(group))
        except Exception:  # noqa: BLE001 - the parent raises it
            pipe.send(traceback.format_exc())


def _run_job(job: Job, group: Any) -> Result:
    from placement.plan import PlacementPlan
    from runtime.checkpoint import load_shard
    from runtime.random_weights import random_shard
    from runtime.worker import RankWorker, local_slots

    plan = PlacementPlan.from_dict(job.plan)
    load = random_shard if job.random_weights else load_shard
    model, report = load(job.model, local_slots(plan, group.rank), getattr(torch, job.dtype), group.device)
    result = Result(expert_bytes_read=report.expert_bytes_read)
    result.expert_parameter_bytes = sum(
        parameter.nbytes for layer in report.layers for parameter in layer.experts.parameters()
    )
    worker = RankWorker(model, report, plan, group, job.exchange)
    worker.context.on_routes = lambda layer, routes: result.routes.setdefault(layer, []).append(routes[0].cpu().numpy())
    _record_logits(worker, result)
    if job.record is not None and group.rank == 0:
        worker.record(_start_recording(job.record, plan, job.model, worker.facts))
    _drive(worker, job, group.world_size, result)
    if worker.recording is not None:
        worker.recording.close()
    result.load = worker.take_load()
    return result


def _start_recording(path: str, plan: Any, model: str, facts: Any) -> Any:
    from runtime.recording import start_recording
    from runtime.recording_settings import RecordSettings

    settings = RecordSettings(record=path, record_rate=1.0, record_token_ids=True)
    return start_recording(settings, plan, model, facts)


def _run_engine(job: EngineJob, group: Any) -> Result:
    """Rank 0 plays the schedule on an engine, the others follow; what rank 0's requests got."""
    from placement.plan import PlacementPlan
    from runtime.checkpoint import load_shard
    from runtime.settings import EngineSettings
    from runtime.worker import RankWorker, local_slots
    from tests.support.schedules import Play

    plan = PlacementPlan.from_dict(job.plan)
    model, report = load_shard(job.model, local_slots(plan, group.rank), torch.float32, group.device)
    worker = RankWorker(model, report, plan, group, job.exchange)
    if group.rank != 0:
        worker.serve()
        return Result()
    played = Play(worker, EngineSettings(**job.settings), job.schedule)
    return Result(events=played.events, pieces=[len(plan.feed) for plan in played.plans])


def _record_logits(worker: Any, result: Result) -> None:
    sample = worker._sample

    def recording(sequences: list[int], logits: torch.Tensor) -> Any:
        sampled = sample(sequences, logits)
        for row, sequence in enumerate(sequences):
            if sequence in sampled:
                result.logits.setdefault(sequence, []).append(logits[row].cpu().numpy())
        return sampled

    worker._sample = recording


def _drive(worker: Any, job: Job, world_size: int, result: Result) -> None:
    """Every rank derives the same plans from the job, as if rank 0 had sent them."""
    from runtime.step_plan import Admission, StepPlan

    sampling = job.sampling or [SamplingParameters(temperature=0, seed=0)] * len(job.prompts)
    retire: list[int] = []
    pending = dict(enumerate(job.arrivals))
    step = 0
    while pending or worker.homes:
        due = [number for number, arrival in pending.items() if arrival <= step]
        if not worker.model.can_merge and (worker.homes.keys() - set(retire)):
            due = []
        for number in due:
            del pending[number]
        homes = {n: 0 if worker.everyone_holds_all else n % world_size for n in due}
        admit = [Admission(n, job.prompts[n], homes[n], sampling[n]) for n in due]
        new = worker.execute(StepPlan.prefill(admit, retire) if admit else StepPlan(retire))
        retire = []
        for sequence, token in new.items():
            if sequence in worker.logprobs:
                result.logprobs.setdefault(sequence, []).append(worker.logprobs[sequence])
            result.tokens.setdefault(sequence, []).append(token)
            if len(result.tokens[sequence]) == job.new_tokens:
                retire.append(sequence)
        if worker.recording is not None:
            for n in retire:
                worker.recording.end(n, [*job.prompts[n], *result.tokens[n]], len(result.tokens[n]))
        step += 1
