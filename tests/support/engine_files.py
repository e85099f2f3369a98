"""One small placement as every engine's file, typed by hand from the engine's schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from placement.engines import ModelLayers, read_slots
from placement.plan import PlacementPlan
from placement.slots import Slots

# Layers 1 and 3 of five are MoE, the others dense; four experts, two GPUs with three slots each.
MODEL = ModelLayers(4, (1, 3), 5)
SLOTS = (((1, 0, 2), (3, 0, 1)), ((3, 2, 1), (0, 2, 3)))

SGLANG = '{"physical_to_logical_map": [[0,1,2,3,0,1],[1,0,2,3,0,1],[0,1,2,3,0,1],[3,2,1,0,2,3],[0,1,2,3,0,1]]}'
VLLM_49572 = "[[1,0,2,3,0,1],[3,2,1,0,2,3]]"
VLLM_41141 = (
    '{"record_type":"eplb_initial_mapping","version":1,"num_redundant_experts":2,"num_slots":6,'
    '"initial_global_assignments":{"0":[1,0,2,3,0,1],"1":[3,2,1,0,2,3]}}\n'
)
VLLM_ASCEND = """{"moe_layer_count":2,"layer_list":[
 {"layer_id":0,"device_count":2,"device_list":[
  {"device_id":0,"device_expert":[1,0,2]},{"device_id":1,"device_expert":[3,0,1]}]},
 {"layer_id":1,"device_count":2,"device_list":[
  {"device_id":0,"device_expert":[3,2,1]},{"device_id":1,"device_expert":[0,2,3]}]}]}"""
TRTLLM = """initial_global_assignments:
  1: [1, 0, 2, 3, 0, 1]
  3: [3, 2, 1, 0, 2, 3]
num_slots: 6
layer_updates_per_iter: 0
"""
FILES = {
    "sglang": SGLANG,
    "vllm-49572": VLLM_49572,
    "vllm-41141": VLLM_41141,
    "vllm-ascend": VLLM_ASCEND,
    "trtllm": TRTLLM,
}
TELL_GPUS = {"vllm-ascend"}


def make_plan(slots: Slots = SLOTS, model: ModelLayers = MODEL, **fields: Any) -> PlacementPlan:
    """A plan of that placement, or of another."""
    return PlacementPlan(
        model="org/name",
        num_experts=model.num_experts,
        top_k=min(2, model.num_experts),
        layer_ids=model.layer_ids,
        slots=slots,
        **fields,
    )


def write_file(folder: Path, name: str, content: str) -> Path:
    """Write an engine's file under a name that the engine takes."""
    path = folder / ("map.yaml" if name == "trtllm" else "map.json")
    path.write_text(content)
    return path


def read_file(folder: Path, name: str, content: str) -> Slots:
    """The placement in an engine's file."""
    return read_slots(write_file(folder, name, content), name, MODEL, None if name in TELL_GPUS else 2)
