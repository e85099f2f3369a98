"""Placement files of serving engines: written and read literally, round trips, and the command line."""

import json
import random
import shlex

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from conf import ConfigError, compose
from conf.command_line import Verb, run_command_line
from placement import export_command, import_command
from placement.engines import ENGINES, ModelLayers, configured_layers, layout_of_plan, read_slots
from placement.plan import PlacementPlan, Workload
from placement.strategies.contiguous import contiguous_plan
from profiler.errors import InputError
from tests.support.engine_files import FILES, SGLANG, SLOTS, TELL_GPUS, make_plan, read_file, write_file
from tests.support.traces import random_sequences, write_trace


def run(*arguments):
    """The command line of both verbs."""

    def verb(name, module):
        def call(flags):
            module.run(flags, compose(name, flags.overrides), Console(width=400), lambda line: None)

        return Verb(name, name, name, module.add_arguments, call)

    verbs = [verb("export", export_command), verb("import", import_command)]
    return run_command_line("placement", "test", verbs, (InputError, ConfigError), list(map(str, arguments)))


@pytest.mark.parametrize("name", ENGINES)
def test_a_file_by_the_engines_schema_is_read_file(tmp_path, name):
    assert read_file(tmp_path, name, FILES[name]) == SLOTS


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_written_is_that_document(name):
    text = ENGINES[name].write(layout_of_plan(make_plan(), ENGINES[name], 5))
    parse = yaml.safe_load if name == "trtllm" else json.loads
    assert parse(text) == parse(FILES[name])


def test_documents_literally():
    """The text itself: SGLang's one key, keys of layers as each engine wants them, JSON lines on one line."""
    written = {name: engine.write(layout_of_plan(make_plan(), engine, 5)) for name, engine in ENGINES.items()}
    dense, first, second = "[0, 1, 2, 3, 0, 1]", "[1, 0, 2, 3, 0, 1]", "[3, 2, 1, 0, 2, 3]"
    rows = ",\n".join([dense, first, dense, second, dense])
    assert written["sglang"] == '{"physical_to_logical_map": [\n' + rows + "\n]}\n"
    assert written["vllm-49572"] == f"[\n{first},\n{second}\n]\n"
    assert written["vllm-41141"] == (
        '{"record_type": "eplb_initial_mapping", "version": 1, "num_redundant_experts": 2, "num_slots": 6, '
        f'"initial_global_assignments": {{"0": {first}, "1": {second}}}}}\n'
    )
    assert written["vllm-ascend"] == (
        '{"moe_layer_count": 2, "layer_list": [\n'
        '{"layer_id": 0, "device_count": 2, "device_list": [{"device_id": 0, "device_expert": [1, 0, 2]}, '
        '{"device_id": 1, "device_expert": [3, 0, 1]}]},\n'
        '{"layer_id": 1, "device_count": 2, "device_list": [{"device_id": 0, "device_expert": [3, 2, 1]}, '
        '{"device_id": 1, "device_expert": [0, 2, 3]}]}\n]}\n'
    )
    assert written["trtllm"] == (
        f"num_slots: 6\ninitial_global_assignments:\n  1: {first}\n  3: {second}\nlayer_updates_per_iter: 0\n"
    )


@st.composite
def even_plans(draw):
    """Plans with copies and equal slots per GPU, and the number of decoder layers: dense ones lead or interleave."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    num_experts, num_gpus = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    per_gpu = draw(st.integers(-(-num_experts // num_gpus), num_experts))
    moe = draw(st.lists(st.booleans(), min_size=1, max_size=7).filter(any))
    layer_ids = tuple(layer for layer, is_moe in enumerate(moe) if is_moe)
    slots = []
    for _ in layer_ids:
        order = generator.sample(range(num_experts), num_experts)
        gpus = [order[gpu::num_gpus] for gpu in range(num_gpus)]
        for held in gpus:
            spare = [expert for expert in range(num_experts) if expert not in held]
            held += generator.sample(spare, per_gpu - len(held))
            generator.shuffle(held)
        slots.append(tuple(map(tuple, gpus)))
    return make_plan(tuple(slots), ModelLayers(num_experts, layer_ids)), len(moe)


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=40, deadline=None)
@given(case=even_plans())
def test_round_trip(tmp_path_factory, name, case):
    plan, num_layers = case
    path = tmp_path_factory.mktemp("maps") / ("map.yaml" if name == "trtllm" else "map.json")
    path.write_text(ENGINES[name].write(layout_of_plan(plan, ENGINES[name], num_layers)))
    model = ModelLayers(plan.num_experts, plan.layer_ids, num_layers)
    assert read_slots(path, name, model, plan.num_gpus) == plan.slots
    assert read_slots(path, name, model, default_gpus=plan.num_gpus) == plan.slots


@settings(max_examples=40, deadline=None)
@given(case=even_plans())
def test_sglang_finds_every_expert_in_every_row(case):
    """SGLang inverts the rows of all decoder layers and draws one of each expert's slots, in dense layers too."""
    plan, num_layers = case
    document = json.loads(ENGINES["sglang"].write(layout_of_plan(plan, ENGINES["sglang"], num_layers)))
    assert list(document) == ["physical_to_logical_map"]
    rows = document["physical_to_logical_map"]
    assert len(rows) == num_layers
    assert {len(row) for row in rows} == {plan.num_gpus * len(plan.slots[0][0])}
    assert all(set(row) == set(range(plan.num_experts)) for row in rows)


def test_one_row_for_all_layers_is_shared(tmp_path):
    shared = ((0, 1, 2), (3, 0, 1))
    assert read_file(tmp_path, "vllm-49572", "[0,1,2,3,0,1]") == (shared, shared)


@pytest.mark.parametrize("name", ENGINES)
def test_an_uneven_plan_is_refused_with_the_remedy(tmp_path, capsys, name):
    plans = [
        contiguous_plan("m", 7, 2, [0, 1], 2),  # seven experts on two GPUs
        make_plan((SLOTS[0], ((0, 1, 2), (3, 0)))),  # one empty slot
        make_plan((SLOTS[0], ((0, 1), (2, 3)))),  # layers of different size
    ]
    output = tmp_path / ("map.yaml" if name == "trtllm" else "map.json")
    for plan, slots in zip(plans, (4, 3, 3), strict=True):
        plan.save(tmp_path / "plan.json")
        assert run("export", "--plan", tmp_path / "plan.json", "--to", name, "-o", output) == 2
        error = capsys.readouterr().err
        assert f"slots_per_gpu={slots}" in error
        assert len(error.strip().splitlines()) == 1
    assert not output.exists()


@pytest.mark.parametrize("name", ENGINES)
def test_export_and_import_by_command_line(tmp_path, capsys, name):
    plan, exported, imported = tmp_path / "plan.json", tmp_path / "map.json", tmp_path / "imported.json"
    cluster = {"nodes": 1, "gpus_per_node": 2}
    original = make_plan(model_fingerprint="ab" * 32, cluster=cluster, workload=Workload("prefill", (16,)))
    original.save(plan)
    assert run("export", "--plan", plan, "--to", name, "-o", exported) == 0
    printed = capsys.readouterr().out
    assert shlex.quote(str(exported)) in printed or json.dumps(str(exported)) in printed
    assert "dispatch rule, 'level'" in printed
    assert ("wrote 4 layers" in printed) == (name == "sglang")
    ranks = {"sglang": "--tp-size 2 --ep-size 2", "trtllm": "--tp_size 2 --ep_size 2"}
    assert ranks.get(name, "--tensor-parallel-size and --data-parallel-size so that their product is 2") in printed
    assert ("move the experts again" in printed) == (name in ("sglang", "vllm-41141", "vllm-49572"))
    if name != "sglang":
        assert run("export", "--plan", plan, "--to", name, "-o", tmp_path / "other.json", "num_layers=9") == 2
        assert "leave num_layers away" in capsys.readouterr().err
        assert not (tmp_path / "other.json").exists()
    assert run("import", "--from", name, exported, "--like", plan, "-o", imported) == 0
    found = PlacementPlan.load(imported)
    same = ("slots", "model", "model_fingerprint", "num_experts", "top_k", "layer_ids", "cluster", "workload")
    assert all(getattr(found, field) == getattr(original, field) for field in same)
    assert found.strategy == "imported"
    assert found.solver["source"] == name
    assert found.predicted == {}


@pytest.mark.parametrize("name", ENGINES)
def test_import_like_a_trace(tmp_path, capsys, name):
    trace, output = tmp_path / "trace.safetensors", tmp_path / "plan.json"
    write_trace(trace, random_sequences([5, 5], num_layers=2, num_experts=4), num_experts=4, layer_ids=[1, 3])
    command = ["import", "--from", name, write_file(tmp_path, name, FILES[name]), "--like", trace, "-o", output]
    if name not in TELL_GPUS:
        assert run(*command) == 2
        assert "add gpus=N" in capsys.readouterr().err
        command.append("gpus=2")
    assert run(*command) == 0
    plan = PlacementPlan.load(output)
    assert (plan.slots, plan.model, plan.top_k, plan.layer_ids) == (SLOTS, "tiny", 2, (1, 3))


def test_another_number_of_gpus_than_the_plan_likened_to(tmp_path, capsys):
    like, output = tmp_path / "like.json", tmp_path / "plan.json"
    make_plan(cluster={"nodes": 1, "gpus_per_node": 2}).save(like)
    one_each = "[[0,1,2,3],[3,2,1,0]]"
    command = [
        "import",
        "--from",
        "vllm-49572",
        write_file(tmp_path, "vllm-49572", one_each),
        "--like",
        like,
        "-o",
        output,
    ]
    assert run(*command, "gpus=4") == 0
    assert "names no cluster" in capsys.readouterr().out
    plan = PlacementPlan.load(output)
    assert (plan.num_gpus, plan.cluster) == (4, {})


def test_the_models_configuration_tells_the_layers(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    plan, exported = tmp_path / "plan.json", tmp_path / "map.json"
    PlacementPlan("model", 4, 2, (1, 3), SLOTS).save(plan)
    command = ["export", "--plan", plan, "--to", "sglang", "-o", exported]

    def rows():
        return len(json.loads(exported.read_text())["physical_to_logical_map"])

    for config, expected in [({"num_hidden_layers": 6}, 6), ({"text_config": {"num_hidden_layers": 7}}, 7), ({}, 4)]:
        (model / "config.json").write_text(json.dumps(config))
        assert run(*command) == 0
        assert rows() == expected
        assert ("wrote 4 layers" in capsys.readouterr().out) == (expected == 4)
    assert run(*command, "num_layers=9") == 0
    assert rows() == 9
    (model / "config.json").write_text('{"num_hidden_layers": 6}')
    imported = ["import", "--from", "sglang", exported, "--like", plan, "-o", tmp_path / "sub.json"]
    assert run(*imported) == 2
    assert "9 rows: expected 6" in capsys.readouterr().err
    assert run(*command) == 0
    assert run(*imported) == 0
    assert PlacementPlan.load(tmp_path / "sub.json").model == "model"
    for count in ("3", "many", "0"):
        assert run(*command, f"num_layers={count}") == 2
        assert "num_layers" in capsys.readouterr().err
    (model / "config.json").write_text("{")
    assert run(*command) == 2
    assert "num_layers=N" in capsys.readouterr().err


def test_no_configuration_is_looked_for_elsewhere(tmp_path):
    assert configured_layers(str(tmp_path)) is None
    assert configured_layers("org/name") is None


def test_engines_that_go_by_the_suffix(tmp_path, capsys):
    make_plan().save(tmp_path / "plan.json")
    for name in ("sglang", "vllm-ascend"):
        assert run("export", "--plan", tmp_path / "plan.json", "--to", name, "-o", tmp_path / "map.txt") == 2
        assert "ends in .json" in capsys.readouterr().err
    assert run("export", "--plan", tmp_path / "plan.json", "--to", "sglang", "-o", tmp_path / "plan.json") == 2
    assert "named twice" in capsys.readouterr().err


def test_a_refused_import_writes_nothing(tmp_path, capsys):
    make_plan().save(tmp_path / "like.json")
    path = write_file(tmp_path, "sglang", SGLANG.replace("3,2,1,0,2,3", "3,2,1,0,2,-1"))
    command = ["import", "--from", "sglang", path, "--like", tmp_path / "like.json", "-o", tmp_path / "plan.json"]
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "padding" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "plan.json").exists()
