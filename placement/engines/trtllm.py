"""TensorRT-LLM: the MoE load balancer's YAML file, one row of slots per MoE layer under its decoder layer's index.

Source: https://github.com/NVIDIA/TensorRT-LLM, examples/wide_ep/ep_load_balancer and tensorrt_llm/llmapi/llm_args.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from placement.engines.layout import (
    Engine,
    EngineLayout,
    ModelLayers,
    Row,
    check_keys,
    check_row,
    check_slot_count,
    read_text,
    shown,
)
from placement.errors import PlanError
from placement.slots import is_int

_ROWS = "initial_global_assignments"


def _write(layout: EngineLayout) -> str:
    """``layer_updates_per_iter: 0`` keeps the placement as it is while serving."""
    named = zip(layout.model.layer_ids, layout.rows, strict=True)
    rows = "".join(f"  {layer_id}: {json.dumps(row)}\n" for layer_id, row in named)
    return f"num_slots: {layout.num_slots}\n{_ROWS}:\n{rows}layer_updates_per_iter: 0\n"


def _read(path: Path, model: ModelLayers) -> tuple[tuple[Row, ...], int | None]:
    document = check_keys(_read_yaml(path), "file", ["num_slots", _ROWS], ["layer_updates_per_iter"])
    by_layer = document[_ROWS]
    if not isinstance(by_layer, dict):
        raise PlanError(f"{_ROWS}: {shown(by_layer)}; expected rows under the indices of MoE layers")
    wrong = [key for key in by_layer if not is_int(key) or key not in model.layer_ids]
    missing = [layer for layer in model.layer_ids if layer not in by_layer]
    if wrong or missing:
        problem = f"key {shown(wrong[0])} is no MoE layer" if wrong else f"layer {missing[0]} is missing"
        raise PlanError(f"{_ROWS}: {problem}; expected the decoder layers {shown(list(model.layer_ids))}")
    rows = []
    for layer_id in model.layer_ids:
        rows.append(check_row(by_layer[layer_id], f"layer {layer_id}", model.num_experts))
        check_slot_count(rows[-1], f"layer {layer_id}", document["num_slots"])
    return tuple(rows), None


def _read_yaml(path: Path) -> Any:
    import yaml

    text = read_text(path)
    try:
        return yaml.safe_load(text)  # not the compiled loader: deep nesting crashes it
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanError(f"not YAML ({' '.join(str(error).split())})") from None


def _start(layout: EngineLayout, path: Path) -> list[str]:
    setting = f"moe_config: {{load_balancer: {json.dumps(str(path))}}}"
    return [
        f"--tp_size {layout.num_gpus} --ep_size {layout.num_gpus}, and in the YAML file given as --config: {setting}",
        "with a MoE backend that has a load balancer, such as WIDEEP",
    ]


ENGINE = Engine("TensorRT-LLM", (), _write, _read, _start)
