"""vLLM with proposal 41141: ``initial_mapping_path``, a JSON line with one row of slots for every MoE layer.

Source: https://github.com/vllm-project/vllm/pull/41141 (open).
"""

from __future__ import annotations

import json
import shlex
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
    check_row,
    check_slot_count,
    read_text,
    shown,
    vllm_ranks,
)
from placement.errors import PlanError

_RECORD_TYPE = "eplb_initial_mapping"
_KEYS = ["record_type", "version", "num_redundant_experts", "num_slots", "initial_global_assignments"]


def _write(layout: EngineLayout) -> str:
    """One line; layers are numbered among the MoE layers, so the first has key 0 whichever decoder layer it is."""
    values = [_RECORD_TYPE, 1, layout.num_redundant, layout.num_slots]
    rows = {str(index): list(row) for index, row in enumerate(layout.rows)}
    return json.dumps(dict(zip(_KEYS, [*values, rows], strict=True))) + "\n"


def _read(path: Path, model: ModelLayers) -> tuple[tuple[Row, ...], int | None]:
    record = check_keys(_read_record(path), "record", _KEYS)
    check_count(record["version"], "version", 1)
    by_key = record["initial_global_assignments"]
    if not isinstance(by_key, dict):
        raise PlanError(f"initial_global_assignments: {shown(by_key)}; expected an object of rows")
    check_layer_count(by_key, model, "layers in initial_global_assignments")
    rows = []
    for index, layer_id in enumerate(model.layer_ids):
        if str(index) not in by_key:
            raise PlanError(f"initial_global_assignments has no key {index}: expected 0, 1, … over the MoE layers")
        where = f"layer {layer_id} (key {index})"
        rows.append(check_row(by_key[str(index)], where, model.num_experts))
        check_slot_count(rows[-1], where, record["num_slots"])
    check_count(record["num_redundant_experts"], "num_redundant_experts", len(rows[0]) - model.num_experts)
    return tuple(rows), None


def _read_record(path: Path) -> Any:
    """The one record of a placement among a file's lines."""
    lines = read_text(path).splitlines()
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not JSON lines ({error})") from None
    found = [record for record in records if isinstance(record, dict) and record.get("record_type") == _RECORD_TYPE]
    if len(found) != 1:
        raise PlanError(f"{len(found)} lines with record_type {_RECORD_TYPE!r}: expected exactly one")
    return found[0]


def _start(layout: EngineLayout, path: Path) -> list[str]:
    config = {"initial_mapping_path": str(path), "num_redundant_experts": layout.num_redundant}
    return [
        f"--enable-expert-parallel --enable-eplb --eplb-config {shlex.quote(json.dumps(config))}",
        vllm_ranks(layout),
        "vLLM may move the experts again: stop its online balancer in --eplb-config to keep this placement, by "
        "disable_online_rebalancing, or by leaving enable_online off, as the installed revision has it",
    ]


ENGINE = Engine("vLLM (proposal 41141)", (), _write, _read, _start)
