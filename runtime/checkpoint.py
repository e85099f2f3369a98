"""Loading one rank's part of a checkpoint: everything but the experts, and only the experts of its slots.

Transformers converts checkpoints of every family (per-expert tensors, fused ones, renamed ones) to its own layout. We
let it: the model is built without storage, its stacked expert parameters are shrunk to this rank's slots, and the
checkpoint's lazy tensors are handed on filtered and renumbered, so that foreign experts are never read from disk.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from profiler.seam import MoELayer, find_moe_layers
from runtime.errors import ModelError, first_line
from runtime.experts import expert_parameter_names, shrink_to_slots

PER_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
Slots = Mapping[int, Sequence[int]]  # decoder layer -> logical ids of this rank's slots


@dataclass
class LoadReport:
    """What one rank read.

    Attributes:
        expert_bytes_read: bytes of expert weights materialised from the checkpoint, in its dtype.
        layers: the model's MoE layers, in decoder order.
    """

    expert_bytes_read: int = 0
    layers: list[MoELayer] = field(default_factory=list)


class _SlotRows:
    """The rows of a tensor ``[E, …]`` that belong to this rank's slots, read when indexed."""

    def __init__(self, source: Any, rows: Sequence[int] | None, count: _ByteCount) -> None:
        self._source, self._rows, self._count = source, rows, count

    def get_shape(self) -> list[int]:
        shape = list(self._source.get_shape())
        return shape if self._rows is None else [len(self._rows), *shape[1:]]

    def get_dtype(self) -> str:
        return str(self._source.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        if self._rows is None:
            rows = self._source[...]
        else:
            parts = [self._source[row : row + 1] for row in self._rows]
            rows = torch.cat(parts) if parts else self._source[0:0]
        self._count.add(rows.nbytes)
        return rows[index]


class _ByteCount:
    """Adds up bytes from Transformers' loader threads."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.total += num_bytes


def load_shard(path: str, slots: Slots, dtype: torch.dtype | str, device: torch.device) -> tuple[Any, LoadReport]:
    """Load a model with only the experts of ``slots``.

    Args:
        path: model directory or hub id.
        slots: for every MoE layer (decoder layer number) the logical ids this rank holds, in slot order.
        dtype: of the parameters; ``"auto"`` keeps the checkpoint's.
        device: where the model ends up.

    Returns:
        The model in evaluation mode, whose experts modules hold ``[P, …]`` parameters, and what was read.

    Raises:
        ModelError: the model cannot be found, read, or sharded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not Path(path).exists() and path.startswith((".", "/", "~")):
        raise ModelError(
            f"model {path}: no such directory; give a directory with config.json and safetensors, or a hub id"
        )
    report = LoadReport()
    count = _ByteCount()
    try:
        with _filtered_loading(slots, report, count):
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"model {path}: cannot be loaded ({first_line(error)}); copy or download it again") from error
    empty = {f"{layer.name}." for layer in report.layers if not slots[layer.layer_id]}
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(tuple(empty) or ("\0",)))
    if missing or info["mismatched_keys"]:
        wrong = missing[0] if missing else next(iter(info["mismatched_keys"]))[0]
        raise ModelError(f"model {path}: the checkpoint lacks or misshapes {wrong}; is the download complete?")
    report.expert_bytes_read = count.total
    return model.eval().requires_grad_(False).to(device), report


@contextmanager
def _filtered_loading(slots: Slots, report: LoadReport, count: _ByteCount) -> Iterator[None]:
    """Let Transformers' loader see a model and a checkpoint that have only this rank's experts."""
    from transformers import modeling_utils

    original = modeling_utils.convert_and_load_state_dict_in_model

    def filtered(model: Any, state_dict: Mapping[str, Any], load_config: Any, *args: Any, **kwargs: Any) -> Any:
        report.layers = find_moe_layers(model)
        for layer in report.layers:
            if layer.layer_id not in slots:
                raise ModelError(f"{layer.name}: the plan has no layer {layer.layer_id}; solve a plan for this model")
        kept = _filter_checkpoint(model, report.layers, state_dict, load_config, slots, count)
        for layer in report.layers:
            shrink_to_slots(layer, len(slots[layer.layer_id]))
        return original(model, kept, load_config, *args, **kwargs)

    with mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", filtered):
        yield


def _filter_checkpoint(
    model: Any,
    layers: Sequence[MoELayer],
    state_dict: Mapping[str, Any],
    load_config: Any,
    slots: Slots,
    count: _ByteCount,
) -> dict[str, Any]:
    """Drop foreign experts and renumber the local ones, whether stored one by one or stacked."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parameters = model.state_dict()
    layer_of = {f"{layer.name}.{name}": layer for layer in layers for name in expert_parameter_names(layer)}
    kept: dict[str, Any] = {}
    for key, tensor in state_dict.items():
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        layer = layer_of.get(target) or layer_of.get(key)
        single = PER_EXPERT.fullmatch(key)
        if layer is None:
            kept[key] = tensor
        elif single is not None:
            for slot, expert in enumerate(slots[layer.layer_id]):
                if expert == int(single[2]):
                    kept[f"{single[1]}{slot}{single[3]}"] = _SlotRows(tensor, None, count)
        else:
            shape = list(tensor.get_shape()) if hasattr(tensor, "get_shape") else list(tensor.shape)
            if not shape or shape[0] != layer.num_experts:
                raise ModelError(f"{key}: shape {shape}, expected {layer.num_experts} experts first; unknown layout")
            kept[key] = _SlotRows(tensor, list(slots[layer.layer_id]), count)
    return kept
