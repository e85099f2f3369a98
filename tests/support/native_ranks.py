"""Jobs for a pool of ranks that decode natively together."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig

from placement.plan import PlacementPlan
from runtime.native.exchange_modes import meet
from runtime.native.families import read_shape
from runtime.native.loading import make_decoder
from runtime.native.model import NativeModel
from runtime.settings import EngineSettings
from runtime.worker import local_slots
from tests.support.native import PAGE_SIZE, Recording, drive


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
class ServingJob:
    """The engine on rank 0, the other ranks following it; the result on rank 0 is tokens, slot loads and bytes sent.

    Attributes:
        model: directory.
        plan: as `PlacementPlan.to_dict` gives it.
        prompts: token ids, continued greedily.
        new_tokens: generated for each prompt.
    """

    model: str
    plan: dict[str, Any]
    prompts: list[list[int]]
    new_tokens: int

    def run(self, group: Any) -> tuple[list[list[int]], list[list[list[int]]], int] | None:
        """Tokens per prompt, pairs per MoE layer, GPU and slot, and exchanged bytes; None on ranks that follow."""
        from runtime.engine import Engine
        from runtime.load import slots_as_lists
        from runtime.native.loading import load_native
        from runtime.requests import SamplingParameters, TokenEvent

        plan = PlacementPlan.from_dict(self.plan)
        settings = EngineSettings(cache_tokens=2048, max_sequences=8, max_prefill_tokens=24, path="native")
        shape = read_shape(AutoConfig.from_pretrained(self.model))
        worker = load_native(plan, self.model, shape, settings, group)
        if group.rank > 0:
            worker.serve()
            return None
        engine = Engine(worker, settings, (), worker.facts.max_context)
        engine.start()
        sampling = SamplingParameters(temperature=0, seed=0, max_tokens=self.new_tokens, ignore_eos=True)
        tokens: list[list[int]] = [[] for _ in self.prompts]
        ended = threading.Semaphore(0)

        def take(number: int, event: TokenEvent) -> None:
            if event.token_id is not None:
                tokens[number].append(event.token_id)
            if event.finish_reason is not None:
                ended.release()

        for number, prompt in enumerate(self.prompts):
            engine.submit(prompt, sampling, functools.partial(take, number))
        for _ in self.prompts:
            assert ended.acquire(timeout=60)
        engine.shutdown()
        total = engine.meter.read().total
        assert total is not None
        return tokens, slots_as_lists(total.pairs, plan.slots), total.exchanged_bytes
