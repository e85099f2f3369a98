"""Jobs for a pool of ranks that decode natively together."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig

from kernels.exchange import Mailbox
from kernels.exchange.mailbox import messages
from placement.plan import PlacementPlan
from runtime.native.exchange_modes import meet
from runtime.native.families import read_shape
from runtime.native.loading import make_decoder
from runtime.native.model import NativeModel
from runtime.requests import TokenLogprobs
from runtime.settings import EngineSettings
from runtime.worker import local_slots
from tests.support.native import PAGE_SIZE, Recording, admission, decode, drive, prefill, retire

HARDLY = {"frequency_penalty": 1e-7}  # has tokens chosen again, and changes none


@dataclass(frozen=True)
class NativeJob:
    """Prompts to continue greedily by a plan.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it.
        prompts: token ids.
        arrivals: the step at which each prompt is admitted.
        new_tokens: generated for each prompt.
        dtype: name of the torch dtype.
        graphs: whether decode steps run as CUDA graphs.
        settings: of the engine.
    """

    model: str
    plan: dict[str, Any]
    prompts: list[list[int]]
    arrivals: list[int]
    new_tokens: int
    dtype: str = "float32"
    graphs: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, group: Any) -> Recording:
        """Execute this in one of the ranks."""
        return drive(self.load(group), self.prompts, self.arrivals, self.new_tokens)

    def load(self, group: Any) -> NativeModel:
        """This rank's part of the model."""
        plan, dtype = PlacementPlan.from_dict(self.plan), getattr(torch, self.dtype)
        config = AutoConfig.from_pretrained(self.model)
        shape = read_shape(config)
        chosen = {"cache_tokens": 2048, "max_sequences": 8, "max_prefill_tokens": 24} | self.settings
        settings = EngineSettings(**chosen)
        ranks = meet(settings.exchange or "allreduce", shape, group, dtype, settings.max_sequences)
        slots = local_slots(plan, group.rank)
        decoder, fill = make_decoder(self.model, config, shape, slots, dtype, group.device, settings, PAGE_SIZE, ranks)
        fill()
        ranks.place(decoder.weights, plan)
        return NativeModel(decoder, settings.max_sequences, settings.max_prefill_tokens, self.graphs)


@dataclass(frozen=True)
class MailboxJob(NativeJob):
    """The same in Triton's interpreter, where mailboxes are files that all ranks map.

    Attributes:
        memory: how the files' paths begin.
        most_rows: of a step that goes through mailboxes.
        mapped: the files, as long as the job lives.
    """

    memory: str = ""
    most_rows: int = 2
    mapped: list[torch.Tensor] = field(default_factory=list)

    def load(self, group: Any) -> NativeModel:
        """See `NativeJob.load`."""
        model = super().load(group)
        ranks = model.decoder.ranks
        assert ranks is not None
        words = max(model.decoder.shape.width, 2 * model.decoder.shape.top_k)  # float32
        size = messages(group.world_size, self.most_rows, words)
        for number in range(ranks.num_mailboxes):
            files = [f"{self.memory}.{rank}.{number}" for rank in range(group.world_size)]
            memories = [torch.from_file(file, shared=True, size=size, dtype=torch.int64) for file in files]
            addresses = [memory.data_ptr() for memory in memories]
            mailbox = Mailbox.in_memory(memories[group.rank], addresses, group.rank, self.most_rows, words)
            ranks.mailboxes.append(mailbox)
            self.mapped.extend(memories)
        return model


@dataclass(frozen=True)
class FailingJob:
    """A model that some rank cannot load; the result is the error that loading ends with on each.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it.
        free_bytes: of every rank's memory, for the cache.
    """

    model: str
    plan: dict[str, Any]
    free_bytes: tuple[int, ...]

    def run(self, group: Any) -> tuple[str, str]:
        """Type and text of the error, both empty where there was none."""
        from runtime.native import loading

        settings = EngineSettings(max_sequences=2, max_prefill_tokens=24, path="native")
        shape = read_shape(AutoConfig.from_pretrained(self.model))
        with mock.patch.object(loading, "_free_bytes", return_value=self.free_bytes[group.rank]):
            try:
                loading.load_native(PlacementPlan.from_dict(self.plan), self.model, shape, settings, group)
            except Exception as error:  # noqa: BLE001 - told by its type
                return type(error).__name__, str(error)
        return "", ""


@dataclass(frozen=True)
class ReplayJob(NativeJob):
    """Prompts decoded by the routers' choice, then by the same experts replayed, then by other ones."""

    def run(self, group: Any) -> list[list[torch.Tensor]]:
        """Logits of this rank's rows, step by step, of the three runs."""
        model = self.load(group)
        own: list[torch.Tensor] = []
        found = [self._decode(model, None, own)]
        layers = sum(model.decoder.shape.moe_layers)
        ids = torch.stack(own).unflatten(0, (self.new_tokens, layers))
        found.append(self._decode(model, ids, []))
        found.append(self._decode(model, (ids + 1) % model.decoder.shape.num_experts, []))
        return found

    def _decode(self, model: NativeModel, routes: torch.Tensor | None, seen: list[torch.Tensor]) -> list[torch.Tensor]:
        ranks = model.decoder.ranks
        assert ranks is not None
        homes = ranks.group.world_size
        numbers = range(len(self.prompts))
        prefill(model, [admission(n, self.prompts[n], self.new_tokens + 1, homes) for n in numbers])
        model.replay(routes)
        mine = len(numbers[ranks.group.rank :: homes])
        if routes is None:
            model.decoder.replace_ids = lambda _, ids: (seen.append(ids[:mine]), ids)[1]
        found = []
        for _ in range(self.new_tokens):
            decode(model)
            found.append(torch.cat(model.logits))
        model.replay(None)
        retire(model, list(numbers))
        return found


@dataclass(frozen=True)
class Served:
    """What an engine gave.

    Attributes:
        tokens: per prompt.
        logprobs: of the tokens, per prompt; None where they were not asked for.
        pairs: per MoE layer, GPU and slot.
        exchanged_bytes: of all ranks.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs | None]]
    pairs: list[list[list[int]]]
    exchanged_bytes: int


@dataclass(frozen=True)
class ServingJob:
    """The engine on rank 0, the other ranks following it.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it, with the exchange mode.
        prompts: token ids, continued greedily.
        new_tokens: generated for each prompt.
        logprobs: how many of the likeliest tokens each prompt asks for, or None.
        record: path of the traces of every prompt, with token ids.
    """

    model: str
    plan: dict[str, Any]
    prompts: list[list[int]]
    new_tokens: int
    logprobs: tuple[int | None, ...]
    record: str

    def run(self, group: Any) -> Served | None:
        """None on ranks that follow."""
        from runtime.engine import Engine
        from runtime.load import slots_as_lists
        from runtime.native.loading import load_native
        from runtime.recording import start_recording
        from runtime.recording_settings import RecordSettings
        from runtime.requests import SamplingParameters, TokenEvent

        plan = PlacementPlan.from_dict(self.plan)
        settings = EngineSettings(cache_tokens=2048, max_sequences=8, max_prefill_tokens=24, path="native")
        shape = read_shape(AutoConfig.from_pretrained(self.model))
        worker = load_native(plan, self.model, shape, settings, group)
        if group.rank > 0:
            worker.serve()
            return None
        record = RecordSettings(record=self.record, record_rate=1.0, record_token_ids=True)
        worker.record(start_recording(record, plan, self.model, worker.facts))
        engine = Engine(worker, settings, (), worker.facts.max_context)
        tokens: list[list[int]] = [[] for _ in self.prompts]
        logprobs: list[list[TokenLogprobs | None]] = [[] for _ in self.prompts]
        ended = threading.Semaphore(0)

        def take(number: int, event: TokenEvent) -> None:
            if event.token_id is not None:
                tokens[number].append(event.token_id)
                logprobs[number].append(event.logprobs)
            if event.finish_reason is not None:
                ended.release()

        for number, (prompt, likeliest) in enumerate(zip(self.prompts, self.logprobs, strict=True)):
            sampling = SamplingParameters(
                temperature=0, seed=0, max_tokens=self.new_tokens, ignore_eos=True, logprobs=likeliest, **HARDLY
            )
            engine.submit(prompt, sampling, functools.partial(take, number))
        engine.start()
        for _ in self.prompts:
            assert ended.acquire(timeout=60)
        engine.shutdown()
        assert worker.recording is not None
        worker.recording.close()
        total = engine.meter.read().total
        assert total is not None
        return Served(tokens, logprobs, slots_as_lists(total.pairs, plan.slots), total.exchanged_bytes)
