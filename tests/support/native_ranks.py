"""Jobs for a pool of ranks that decode natively together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig

from placement.plan import PlacementPlan
from runtime.native.families import read_shape
from runtime.native.loading import make_decoder
from runtime.native.model import NativeModel
from runtime.native.ranks import Ranks
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
        ranks = Ranks.meet(shape, group, dtype, settings.max_sequences)
        slots = local_slots(plan, group.rank)
        decoder, fill = make_decoder(self.model, config, shape, slots, dtype, group.device, settings, PAGE_SIZE, ranks)
        fill()
        ranks.place(decoder.weights, plan)
        return NativeModel(decoder, settings.max_sequences, settings.max_prefill_tokens, self.graphs)
