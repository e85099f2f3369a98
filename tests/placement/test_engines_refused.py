"""Placement files of serving engines that are refused, each with one line."""

import itertools
import json

import pytest
from rich.console import Console

from placement.engines import ENGINES, read_slots
from placement.errors import PlanError
from tests.support.engine_files import (
    FILES,
    MODEL,
    SGLANG,
    SLOTS,
    TELL_GPUS,
    TRTLLM,
    VLLM_41141,
    VLLM_ASCEND,
    write_file,
)


def refusal(path, name, gpus=2):
    with pytest.raises(PlanError) as caught:
        read_slots(path, name, MODEL, None if name in TELL_GPUS else gpus)
    message = str(caught.value)
    assert message.startswith(f"{name} file {path}: ")
    assert "\n" not in message
    return message


def test_sglangs_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "map.pt"
    rows = torch.tensor(json.loads(SGLANG)["physical_to_logical_map"])
    torch.save({"physical_to_logical_map": rows}, path)
    assert read_slots(path, "sglang", MODEL, 2) == SLOTS
    for content, message in [
        ({"physical_to_logical_map": rows.float()}, "0.0"),
        ({"logical_count": rows}, "logical_count holds counts"),
        (rows, "expected an object"),
        ({"physical_to_logical_map": rows, "code": Console}, "tensors alone"),
    ]:
        torch.save(content, path)
        assert message in refusal(path, "sglang")
    for broken in (b"", b"PK\x03\x04", b"nothing of the kind"):
        path.write_bytes(broken)
        assert "tensors alone" in refusal(path, "sglang")
    assert "cannot be read" in refusal(tmp_path / "missing.pt", "sglang")


BAD_ROWS = [
    ("[0, 1, 2, 3, 0, NaN]", "slot 5: nan"),
    ("[0, 1, 2, 3, 0, -1]", "slot 5: -1, padding"),
    ("[0, 1, 2, 3, 0, -7]", "slot 5: -7"),
    ("[0, 1, 2, 3, 0, 4]", "slot 5: 4"),
    ("[0, 1, 2, 3, 0, 1.0]", "slot 5: 1.0"),
    ('[0, 1, 2, 3, 0, "1"]', "slot 5: '1'"),
    ("[0, 1, 2, 3, 0, true]", "slot 5: True"),
    ("[0, 1, 2, 3, 0, null]", "slot 5: None"),
    ("[0, 1, 2, 3, 0, [1]]", "slot 5: [1]"),
    ("[0, 1, 2, 2, 0, 1]", "expert 3 is on no GPU"),
    ("[0, 1, 2, 3, 0, 3]", "expert 3 is on GPU 1 twice"),
    ("[]", " slots"),
]


@pytest.mark.parametrize("name", ["sglang", "vllm-49572", "vllm-41141", "trtllm"])
@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_refused(tmp_path, name, row, message):
    good = {"trtllm": "[3, 2, 1, 0, 2, 3]"}.get(name, "[3,2,1,0,2,3]")
    row = row.replace("NaN", ".nan") if name == "trtllm" else row
    content = FILES[name].replace(good, row)
    assert content != FILES[name]
    found = refusal(write_file(tmp_path, name, content), name)
    assert message in found
    assert "layer 3" in found


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("[0,2,NaN]", "device 1, slot 2: nan"),
        ("[0,2,-1]", "device 1, slot 2: -1, padding"),
        ("[0,2,4]", "device 1, slot 2: 4"),
        ("[1,2,3]", "expert 0 is on no GPU"),
        ("[0,3,3]", "expert 3 is on GPU 1 twice"),
        ("[0,2]", "experts of device 1 2: expected 3"),
    ],
)
def test_a_bad_device_is_refused(tmp_path, devices, message):
    found = refusal(write_file(tmp_path, "vllm-ascend", VLLM_ASCEND.replace("[0,2,3]", devices)), "vllm-ascend")
    assert message in found
    assert "layer 3" in found


@pytest.mark.parametrize(("name", "other"), list(itertools.permutations(ENGINES, 2)))
def test_another_engines_file_is_refused(tmp_path, name, other):
    assert refusal(write_file(tmp_path, name, FILES[other]), name)


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_no_document_is_refused(tmp_path, name):
    path = tmp_path / "map.json"
    for content in (b"", b"{", b"[", b"null", b"7", b"\xff\xfe", b"[" * 20_000, b"{}", b"[]", b'{"a": [1'):
        path.write_bytes(content)
        refusal(path, name)
    assert "cannot be read" in refusal(tmp_path / "missing.json", name)
    assert "cannot be read" in refusal(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("sglang", "[0,1,2,3,0,1],[1,0,2,3,0,1],[0", "[0", "has 3 rows: expected 5"),
        ("sglang", '"physical_to_logical_map"', '"model":"m","physical_to_logical_map"', "'model' is not of this"),
        ("sglang", "physical_to_logical_map", "logical_count", "logical_count holds counts"),
        ("sglang", "[[0,1,2,3,0,1]", "[[0,1,2,3]", "layer 1 has 6 slots, layer 0 has 4"),
        ("sglang", "[[0,1,2,3,0,1]", "[[0,1,2,3,0,9]", "layer 0, slot 5: 9"),
        ("sglang", "[[0,1,2,3,0,1]", "[7", "layer 0: 7; expected a list"),
        ("vllm-49572", "[[", "[[0,1,2,3,0,1],[", "3 rows, the model has 2 MoE layers"),
        ("vllm-49572", "[3,2,1,0,2,3]", "3", "layer 3: 3; expected a list"),
        ("vllm-49572", "2,3]]", "2]]", "layer 3 has 5 slots, layer 1 has 6"),
        ("vllm-41141", '"version":1', '"version":2', "version 2: expected 1"),
        ("vllm-41141", '"num_slots":6', '"num_slots":8', "has 6 slots, num_slots says 8"),
        ("vllm-41141", '"num_redundant_experts":2', '"num_redundant_experts":1', "num_redundant_experts 1: expected 2"),
        ("vllm-41141", '"1":', '"3":', "no key 1"),
        ("vllm-41141", ',"1":[3,2,1,0,2,3]', "", "1 layers in initial_global_assignments"),
        ("vllm-41141", "eplb_initial_mapping", "eplb_load_stats", "0 lines with record_type"),
        ("vllm-41141", "}}\n", "}}\n{", "not JSON lines"),
        ("vllm-41141", VLLM_41141, VLLM_41141 * 2, "2 lines with record_type"),
        ("vllm-41141", '{"0":[1,0,2,3,0,1],"1":[3,2,1,0,2,3]}', "[1]", "expected an object of rows"),
        ("vllm-ascend", '"moe_layer_count":2', '"moe_layer_count":3', "moe_layer_count 3: expected 2"),
        ("vllm-ascend", '"layer_id":1', '"layer_id":0', "layer_id [0, 0]"),
        ("vllm-ascend", '"layer_id":0', '"layer_id":5', "position decides"),
        ("vllm-ascend", '"device_id":1', '"device_id":-1', "position decides"),
        ("vllm-ascend", '"device_count":2', '"device_count":3', "device_count 3: expected 2"),
        ("vllm-ascend", ',{"device_id":1,"device_expert":[0,2,3]}', "", "devices in device_list 1: expected 2"),
        ("vllm-ascend", '"device_expert":[0,2,3]', '"experts":[0,2,3]', "'device_expert' is missing"),
        ("trtllm", "  1: [", "  0: [", "key 0 is no MoE layer"),
        ("trtllm", "  3: [3, 2, 1, 0, 2, 3]\n", "", "layer 3 is missing"),
        ("trtllm", "  3: ", "  '3': ", "key '3' is no MoE layer"),
        ("trtllm", "num_slots: 6", "num_slots: 8", "has 6 slots, num_slots says 8"),
        ("trtllm", "num_slots: 6", "num_slots: 6\nep_size: 2", "'ep_size' is not of this format"),
        ("trtllm", TRTLLM, "num_slots: 6\nlayer_updates_per_iter: 2\n", "'initial_global_assignments' is missing"),
        ("trtllm", "num_slots: 6", "num_slots: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_contradiction_is_refused(tmp_path, name, old, new, message):
    content = FILES[name].replace(old, new)
    assert content != FILES[name]
    assert message in refusal(write_file(tmp_path, name, content), name)


def test_the_number_of_gpus_is_checked(tmp_path):
    path = write_file(tmp_path, "sglang", SGLANG)
    assert "6 slots do not divide among 4 GPUs" in refusal(path, "sglang", 4)
    for gpus in (0, -1, 1.5, "2", True):
        with pytest.raises(PlanError, match="gpus"):
            read_slots(path, "sglang", MODEL, gpus)
    with pytest.raises(PlanError, match="lists 2 GPUs, gpus=3"):
        read_slots(write_file(tmp_path, "vllm-ascend", VLLM_ASCEND), "vllm-ascend", MODEL, 3)
