"""``python -m profiler trace``: from a model and a file of prompts to a routing trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from profiler.fingerprint import model_fingerprint
from profiler.prompts import Prompt, read_prompts, tokenize_prompts
from profiler.settings import TraceSettings
from profiler.trace_header import require_output
from profiler.trace_writer import TraceWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def record_trace(settings: TraceSettings, output: Path) -> None:
    """Record the routes of every prompt and its continuation; prompts and settings are checked before weights load.

    Args:
        settings: what to run, and how.
        output: the trace to write; it appears whole or not at all.

    Raises:
        InputError: the model, the prompts, a setting or the output is not usable.
    """
    require_output(output, [settings.prompts])
    prompts = read_prompts(settings.prompts, settings.limit)
    fingerprint = model_fingerprint(settings.model)

    from profiler.environment import check_environment
    from profiler.gate_ahead import require_two_layers
    from profiler.model_loading import (
        choose_device,
        context_tokens,
        find_layers_without_weights,
        load_config,
        load_model,
        load_tokenizer,
    )
    from profiler.recorder import require_one_shape

    check_environment()
    device = choose_device(settings.device)
    config = load_config(settings.model)
    layers = find_layers_without_weights(settings.model, config)
    require_one_shape(layers)
    if settings.gate_ahead:
        require_two_layers(layers)
    token_ids = tokenize_prompts(
        prompts,
        load_tokenizer(settings.model),
        settings.max_new_tokens,
        context_tokens(config),
        settings.max_prompt_tokens,
    )
    model = load_model(settings.model, settings.dtype, device)
    _write_trace(settings, output, model, fingerprint, prompts, token_ids)


def _write_trace(
    settings: TraceSettings,
    output: Path,
    model: PreTrainedModel,
    fingerprint: str,
    prompts: Sequence[Prompt],
    token_ids: Sequence[Sequence[int]],
) -> None:
    from profiler.recorder import record_routes
    from profiler.seam import find_moe_layers

    layers = find_moe_layers(model)
    sampled = f", temperature {settings.temperature}, seed {settings.seed}" if settings.temperature else ""
    writer = TraceWriter(
        output,
        model=os.path.abspath(settings.model) if os.path.isdir(settings.model) else settings.model,
        num_experts=layers[0].num_experts,
        layer_ids=[layer.layer_id for layer in layers],
        top_k=layers[0].top_k,
        weights=settings.weights,
        token_ids=settings.token_ids,
        gate_ahead=settings.gate_ahead,
        model_fingerprint=fingerprint,
        expert_bytes=layers[0].expert_bytes,
        source=f"{settings.prompts.name}: {len(prompts)} prompts, up to {settings.max_new_tokens} new tokens{sampled}",
    )
    with writer, _progress(len(prompts), settings) as progress:
        routes = record_routes(
            model,
            token_ids,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            gate_ahead=settings.gate_ahead,
            on_forward=progress.forward_done,
        )
        for prompt, record in zip(prompts, routes, strict=True):
            writer.add_sequence(
                record.experts,
                decode=record.decode,
                weights=record.weights if settings.weights else None,
                token_ids=record.token_ids if settings.token_ids else None,
                gate_ahead=record.gate_ahead,
                domain=prompt.domain,
            )
            progress.prompt_done(len(record.experts))


class _RecordingProgress:
    """Moves a bar of prompts; within a batch it moves with the forward passes, by what they promise at most."""

    def __init__(self, progress: Progress, num_prompts: int, settings: TraceSettings) -> None:
        self._progress = progress
        self._task = progress.add_task("recording", total=num_prompts, tokens="0 tokens")
        self._num_prompts, self._batch_size = num_prompts, settings.batch_size
        self._passes_per_batch = settings.max_new_tokens
        self._prompts, self._passes, self._tokens = 0, 0, 0

    def forward_done(self) -> None:
        self._passes = min(self._passes + 1, self._passes_per_batch)
        batch = min(self._batch_size, self._num_prompts - self._prompts)
        self._progress.update(self._task, completed=self._prompts + batch * self._passes / self._passes_per_batch)

    def prompt_done(self, tokens: int) -> None:
        self._prompts, self._passes, self._tokens = self._prompts + 1, 0, self._tokens + tokens
        speed = self._tokens / max(self._progress.tasks[0].elapsed or 0.0, 1e-9)
        self._progress.update(self._task, tokens=f"{self._tokens:,} tokens, {speed:,.0f} tokens/s")
        if self._prompts == self._num_prompts:
            self._progress.update(self._task, completed=self._num_prompts)


@contextmanager
def _progress(num_prompts: int, settings: TraceSettings) -> Iterator[_RecordingProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _RecordingProgress(progress, num_prompts, settings)
