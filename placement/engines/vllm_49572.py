"""vLLM with proposal 49572: ``initial_expert_map_path``, one row of physical slots for every MoE layer.

Source: https://github.com/vllm-project/vllm/pull/49572 (open).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from placement.engines.layout import (
    Engine,
    EngineLayout,
    ModelLayers,
    Row,
    check_layer_count,
    check_list,
    check_row,
    read_json,
    vllm_ranks,
)


def _write(layout: EngineLayout) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in layout.rows) + "\n]\n"


def _read(path: Path, model: ModelLayers) -> tuple[tuple[Row, ...], int | None]:
    rows = check_list(read_json(path), "file")
    if rows and not any(isinstance(row, list) for row in rows):  # one row that all layers share
        return (check_row(rows, "shared row", model.num_experts),) * len(model.layer_ids), None
    check_layer_count(rows, model, "rows")
    named = zip(model.layer_ids, rows, strict=True)
    return tuple(check_row(row, f"layer {layer_id}", model.num_experts) for layer_id, row in named), None


def _start(layout: EngineLayout, path: Path) -> list[str]:
    config = {"initial_expert_map_path": str(path), "num_redundant_experts": layout.num_redundant}
    return [
        f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(config))}",
        vllm_ranks(layout),
        "vLLM will move the experts again after step_interval steps: raise it in --eplb-config to keep this placement",
    ]


ENGINE = Engine("vLLM (proposal 49572)", (), _write, _read, _start)
