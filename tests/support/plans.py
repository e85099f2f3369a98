"""Plans of several kinds for a model directory, for tests of the runtime."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from placement.plan import Dispatch, PlacementPlan, Workload
from profiler.fingerprint import model_fingerprint
from profiler.seam import find_moe_layers

KINDS = ("contiguous", "shuffled", "replicated", "uneven")


def make_plan(model: str, kind: str, num_gpus: int, exchange: str = "allreduce", seed: int = 0) -> PlacementPlan:
    """A plan of one kind: contiguous, shuffled, replicated (two copies more per GPU, splitting), or uneven."""
    with torch.device("meta"):
        layers = find_moe_layers(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))
    generator = random.Random(seed)
    num_experts = layers[0].num_experts
    return PlacementPlan(
        model=model,
        model_fingerprint=model_fingerprint(model),
        num_experts=num_experts,
        top_k=layers[0].top_k,
        layer_ids=tuple(layer.layer_id for layer in layers),
        slots=tuple(_slots(kind, num_experts, num_gpus, generator) for _ in layers),
        workload=Workload(exchange=exchange),
        dispatch=Dispatch(split_above_tokens=3 if kind == "replicated" else None),
        strategy=kind,
    )


def _slots(kind: str, num_experts: int, num_gpus: int, generator: random.Random) -> tuple[tuple[int, ...], ...]:
    order = list(range(num_experts))
    if kind != "contiguous":
        generator.shuffle(order)
    bounds = [gpu * num_experts // num_gpus for gpu in range(num_gpus + 1)]
    if kind == "uneven" and num_gpus > 1:  # the last GPU holds nothing of its own
        cuts = sorted(generator.sample(range(1, num_experts), num_gpus - 2)) if num_gpus > 2 else []
        bounds = [0, *cuts, num_experts, num_experts]
    gpus = [order[start:end] for start, end in itertools.pairwise(bounds)]
    if kind == "replicated" and num_gpus > 1:
        gpus = [own + generator.sample(_others(order, own), min(2, num_experts - len(own))) for own in gpus]
    if kind == "uneven" and num_gpus > 1:
        gpus[0] += generator.sample(_others(order, gpus[0]), min(1, num_experts - len(gpus[0])))
    return tuple(tuple(gpu) for gpu in gpus)


def _others(experts: Sequence[int], own: Sequence[int]) -> list[int]:
    return [expert for expert in experts if expert not in own]
