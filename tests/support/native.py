"""Native models from saved ones, and driving them by a schedule of arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from runtime.native.families import read_shape
from runtime.native.loading import make_decoder
from runtime.native.model import NativeModel
from runtime.requests import SamplingParameters
from runtime.settings import EngineSettings
from runtime.step_plan import Admission, StepPlan

PAGE_SIZE = 16
PAGES_EACH = 16  # of a sequence, so that 8 fit into the cache


def native_model(
    path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    slots: Sequence[int] | None = None,
    page_size: int = PAGE_SIZE,
    graphs: bool = False,
    **settings: Any,
) -> NativeModel:
    """Load a saved model; ``slots`` orders every layer's experts, by default as they are numbered."""
    config = AutoConfig.from_pretrained(path)
    shape = read_shape(config)
    chosen = EngineSettings(**({"cache_tokens": 2048, "max_sequences": 8, "max_prefill_tokens": 24} | settings))
    held = dict.fromkeys(range(shape.num_layers), slots or range(shape.num_experts))
    decoder, fill = make_decoder(path, config, shape, held, dtype, torch.device(device), chosen, page_size)
    fill()
    return NativeModel(decoder, chosen.max_sequences, chosen.max_prefill_tokens, graphs)


def admission(number: int, prompt: Sequence[int], new_tokens: int, homes: int = 1) -> Admission:
    """A greedy request, with pages by its number, dealt to so many ranks."""
    pages = -(-(len(prompt) + new_tokens) // PAGE_SIZE)
    assert pages <= PAGES_EACH
    first = number * PAGES_EACH
    sampling = SamplingParameters(temperature=0, seed=0)
    return Admission(number, list(prompt), number % homes, sampling, pages=list(range(first, first + pages)))


def prefill(model: NativeModel, admissions: Sequence[Admission]) -> dict[int, int]:
    """Feed whole prompts while what runs pauses; the first new tokens."""
    return model.launch(StepPlan.prefill(admissions))()


def decode(model: NativeModel) -> dict[int, int]:
    """One token for every running sequence."""
    return model.launch(StepPlan())()


def retire(model: NativeModel, sequences: Sequence[int]) -> None:
    """Drop sequences."""
    model.launch(StepPlan(retire=list(sequences), decode=False))()


class Recording:
    """Tokens of every sequence and float32 logits ``[V]`` of those at home on this rank, step by step."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[np.ndarray]] = {}

    def note(self, model: NativeModel, new: dict[int, int]) -> None:
        """Add what a step gave."""
        rows = torch.cat(model.logits).float().cpu().numpy() if model.logits else ()
        for sequence, token in new.items():
            self.tokens.setdefault(sequence, []).append(token)
        for sequence, row in zip(model.sampled, rows, strict=True):
            self.logits.setdefault(sequence, []).append(row.copy())


def drive(model: NativeModel, prompts: Sequence[Sequence[int]], arrivals: Sequence[int], new_tokens: int) -> Recording:
    """Admit each prompt at its step and decode until all have so many tokens."""
    recording = Recording()
    ranks = model.decoder.ranks
    homes = ranks.group.world_size if ranks is not None and ranks.splits_rows else 1
    step = 0
    while len(recording.tokens) < len(prompts) or model.running:
        due = [number for number, arrival in enumerate(arrivals[: len(prompts)]) if arrival == step]
        if due:
            recording.note(model, prefill(model, [admission(n, prompts[n], new_tokens, homes) for n in due]))
        elif model.running:
            recording.note(model, decode(model))
        retire(model, [number for number in model.running if len(recording.tokens[number]) == new_tokens])
        step += 1
    return recording
