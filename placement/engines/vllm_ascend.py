"""vllm-ascend: ``expert_map_path``, the experts of every device of every MoE layer.

Source: https://github.com/vllm-project/vllm-ascend, vllm_ascend/eplb/core/eplb_utils.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from placement.engines.layout import (
    Engine,
    EngineLayout,
    ModelLayers,
    Row,
    check_count,
    check_keys,
    check_layer_count,
    check_list,
    check_row,
    read_json,
    shown,
    vllm_ranks,
)
from placement.errors import PlanError
from placement.slots import is_int


def _write(layout: EngineLayout) -> str:
    """Layers are found by their position in the list, counted over the MoE layers; ``layer_id`` repeats it."""
    per_gpu = layout.num_slots // layout.num_gpus
    layers = []
    for index, row in enumerate(layout.rows):
        held = [list(row[gpu * per_gpu : (gpu + 1) * per_gpu]) for gpu in range(layout.num_gpus)]
        devices = [{"device_id": gpu, "device_expert": experts} for gpu, experts in enumerate(held)]
        layers.append(json.dumps({"layer_id": index, "device_count": layout.num_gpus, "device_list": devices}))
    return f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n' + ",\n".join(layers) + "\n]}\n"


def _read(path: Path, model: ModelLayers) -> tuple[tuple[Row, ...], int | None]:
    document = check_keys(read_json(path), "file", ["moe_layer_count", "layer_list"])
    layers = check_list(document["layer_list"], "layer_list")
    check_layer_count(layers, model, "layers in layer_list")
    check_count(document["moe_layer_count"], "moe_layer_count", len(layers))
    checked = [
        check_keys(layer, f"layer {layer_id}", ["device_count", "device_list"], ["layer_id"])
        for layer_id, layer in zip(model.layer_ids, layers, strict=True)
    ]
    _check_order(checked, "layer_id", "layer_list")
    devices = [check_list(layer["device_list"], "device_list") for layer in checked]
    rows = []
    for layer_id, layer, held in zip(model.layer_ids, checked, devices, strict=True):
        where = f"layer {layer_id}"
        check_count(layer["device_count"], f"{where}: device_count", len(devices[0]))
        check_count(len(held), f"{where}: devices in device_list", len(devices[0]))
        rows.append(_read_devices(held, where, model.num_experts))
    return tuple(rows), len(devices[0])


def _read_devices(held: Sequence[object], where: str, num_experts: int) -> Row:
    """The slots of one layer, device after device."""
    devices = [check_keys(device, f"{where}, device", ["device_expert"], ["device_id"]) for device in held]
    if not devices:
        raise PlanError(f"{where}: device_list is empty; expected one entry per device")
    _check_order(devices, "device_id", f"{where}: device_list")
    rows = [check_row(device["device_expert"], f"{where}, device {i}", num_experts) for i, device in enumerate(devices)]
    for device, row in enumerate(rows):
        check_count(len(row), f"{where}: experts of device {device}", len(rows[0]))
    return tuple(expert for row in rows for expert in row)


def _check_order(entries: Sequence[Any], key: str, where: str) -> None:
    """Refuse ids out of order: vllm-ascend goes by the position in the list and would not do what the ids say."""
    ids = [entry[key] for entry in entries if key in entry]
    if not all(is_int(value) for value in ids) or ids != sorted(set(ids)):
        raise PlanError(f"{where}: {key} {shown(ids)}; expected ascending integers, because position decides")


def _start(layout: EngineLayout, path: Path) -> list[str]:
    config = {"eplb_config": {"expert_map_path": str(path)}}
    return [f"--enable-expert-parallel --additional-config {shlex.quote(json.dumps(config))}", vllm_ranks(layout)]


ENGINE = Engine("vllm-ascend", (".json",), _write, _read, _start)
