"""The facts about a model that recordings do not tell, from the command line: ``--like``, or one flag for each."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from profiler.errors import InputError
from profiler.importers.recording import ModelFacts
from profiler.trace_header import COUNTS_FORMAT, MOST_EXPERTS, read_header

_MOST_LAYERS = 10_000


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model was recorded."""
    parser.add_argument(
        "--like", help="take what the recording does not tell from a trace or counts (.safetensors), or from a model"
    )
    parser.add_argument("--model", help="the model's name, where --like is not given")
    parser.add_argument("--num-experts", type=int, help="experts per layer, where neither file nor --like tells")
    parser.add_argument("--top-k", type=int, help="experts per token, likewise")
    parser.add_argument("--layers", help="decoder layers that are MoE, likewise: 3-60, or 1,3,5")


def read_model_facts(flags: argparse.Namespace) -> ModelFacts:
    """What ``--like`` and the other flags tell together.

    Raises:
        InputError: neither names a model, a flag is malformed, or it contradicts ``--like``.
    """
    given: dict[str, Any] = {
        "num_experts": _in_range(flags.num_experts, "--num-experts"),
        "top_k": _in_range(flags.top_k, "--top-k"),
        "layer_ids": None if flags.layers is None else _parse_layers(flags.layers),
    }
    if flags.like is None:
        if not flags.model:
            raise InputError("which model was recorded? add --like with a trace or a model, or --model with its name")
        return ModelFacts(flags.model, **given)
    facts = _like(flags.like)
    for name, value in (given | {"model": flags.model}).items():
        known = getattr(facts, name)
        if value is not None and known not in (None, value):
            flag = "layers" if name == "layer_ids" else name.replace("_", "-")
            raise InputError(f"--{flag} is {value}, {flags.like} says {known}; leave one of the two away")
    return replace(facts, **{name: value for name, value in given.items() if value is not None})


def _in_range(value: int | None, flag: str) -> int | None:
    if value is not None and not 1 <= value <= MOST_EXPERTS:
        raise InputError(f"{flag} {value}: expected 1 to {MOST_EXPERTS}")
    return value


def _parse_layers(text: str) -> tuple[int, ...]:
    """``1-3,5`` → 1, 2, 3, 5."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part, re.ASCII)
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if not first <= last < _MOST_LAYERS or (layers and first <= layers[-1]):
            raise InputError(f"--layers {text}: expected rising decoder layers, such as 3-60 or 1,3,5")
        layers += range(first, last + 1)
    return tuple(layers)


def _like(name: str) -> ModelFacts:
    path = Path(name)
    if path.suffix != ".safetensors" or path.is_dir():
        return _like_model(os.path.expanduser(name))
    from profiler.trace_format import RoutingCounts, RoutingTrace

    if read_header(path)[0].get("format") == COUNTS_FORMAT:
        counts = RoutingCounts.open(path)
        return ModelFacts(counts.model, counts.num_experts, None, counts.layer_ids)
    with RoutingTrace.open(path, validate=False) as trace:
        return ModelFacts(
            trace.model,
            trace.num_experts,
            trace.top_k,
            trace.layer_ids,
            model_fingerprint=trace.model_fingerprint,
            expert_bytes=trace.expert_bytes,
        )


def _like_model(model: str) -> ModelFacts:
    """From a model's configuration alone: Transformers builds it without weights, which tells dense layers from MoE."""
    from profiler.fingerprint import model_fingerprint

    fingerprint = model_fingerprint(model)
    try:
        from profiler.model_loading import find_layers_without_weights, load_config
    except ImportError as error:
        raise InputError(
            f"--like {model}: reading a model needs {error.name}; install it, or give --model, --num-experts, --top-k "
            "and --layers"
        ) from error
    config = load_config(model)
    layers = find_layers_without_weights(model, config)
    num_layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    return ModelFacts(
        os.path.abspath(model) if os.path.isdir(model) else model,
        layers[0].num_experts,
        layers[0].top_k,
        tuple(layer.layer_id for layer in layers),
        num_layers if isinstance(num_layers, int) else None,
        fingerprint,
    )
