"""What ``conf.compose`` accepts, and what it says about everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

import conf
from conf import ConfigError, choices, compose


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of one root and one group, in place of the project's; the working directory is beside it."""
    folder = tmp_path / "conf"
    (folder / "cluster").mkdir(parents=True)
    (folder / "plan.yaml").write_text(
        "defaults: [{cluster: small}, _self_]\nmodel: ???\nseed: 0\nsolver: {name: ilp, seconds: 60}\n",
        encoding="utf-8",
    )
    (folder / "cluster" / "small.yaml").write_text("nodes: 1\ngpus_per_node: 2\n", encoding="utf-8")
    (folder / "cluster" / "large.yaml").write_text("nodes: 2\ngpus_per_node: 8\n", encoding="utf-8")
    monkeypatch.setattr(conf, "CONFIG_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def message_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose("plan", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_overrides() -> None:
    composed = compose("plan", ["model=org/name-1.5", "solver.seconds=1e-3", "cluster.nodes=4"])
    assert composed == {
        "model": "org/name-1.5",
        "seed": 0,
        "solver": {"name": "ilp", "seconds": 0.001},
        "cluster": {"nodes": 4, "gpus_per_node": 2},
    }
    assert type(composed["cluster"]) is dict


def test_values_keep_their_types() -> None:
    composed = compose("plan", ["model='7'", "seed=null", "solver.name=[1,2]", "solver.seconds=true"])
    assert (composed["model"], composed["seed"], composed["solver"]) == ("7", None, {"name": [1, 2], "seconds": True})


def test_value_with_commas_may_be_quoted() -> None:
    assert compose("plan", ['model="a, b (c)"'])["model"] == "a, b (c)"


def test_preset_of_a_group() -> None:
    assert compose("plan", ["model=m", "cluster=large"])["cluster"] == {"nodes": 2, "gpus_per_node": 8}
    assert choices("cluster") == ["large", "small"]


def test_file_replaces_the_whole_group(tmp_path: Path) -> None:
    (tmp_path / "measured.yaml").write_text("nodes: 3\nlatency_s: 3e-6\n", encoding="utf-8")
    for name in ("measured.yaml", "./measured.yaml", str(tmp_path / "measured.yaml")):
        assert compose("plan", ["model=m", f"cluster={name}"])["cluster"] == {"nodes": 3, "latency_s": 3e-6}


def test_single_keys_apply_on_top_of_a_file_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "measured.yaml").write_text("nodes: 3\nlinks: {nvlink: 1}\n", encoding="utf-8")
    for overrides in (
        ["cluster=measured.yaml", "cluster.links.nvlink=2"],
        ["cluster.links.nvlink=2", "cluster=measured.yaml"],
    ):
        assert compose("plan", ["model=m", *overrides])["cluster"] == {"nodes": 3, "links": {"nvlink": 2}}


def test_second_file_is_not_confused_with_the_first(tmp_path: Path) -> None:
    for nodes in (3, 4):
        (tmp_path / f"{nodes}.yaml").write_text(f"nodes: {nodes}\n", encoding="utf-8")
        assert compose("plan", ["model=m", f"cluster={nodes}.yaml"])["cluster"] == {"nodes": nodes}
    assert compose("plan", ["model=m"])["cluster"] == {"nodes": 1, "gpus_per_node": 2}


def test_yaml_file_as_an_ordinary_value() -> None:
    assert compose("plan", ["model=some/file.yaml"])["model"] == "some/file.yaml"


def test_missing_value_names_the_key() -> None:
    assert "model is not set: add model=VALUE" in message_of()


@pytest.mark.parametrize("override", ["sed=1", "solver.second=1", "cluster.node=3", "clusters=large", "seed.nested=1"])
def test_unknown_key_is_refused(override: str) -> None:
    message = message_of("model=m", override)
    assert repr(override.split("=")[0]) in message
    assert "conf/plan.yaml" in message


def test_unknown_key_on_top_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "measured.yaml").write_text("nodes: 3\n", encoding="utf-8")
    assert "'cluster.gpus_per_node'" in message_of("model=m", "cluster=measured.yaml", "cluster.gpus_per_node=3")


def test_unknown_preset_lists_the_known_ones() -> None:
    message = message_of("model=m", "cluster=huge")
    assert "cluster/huge" in message
    assert "large small" in message


@pytest.mark.parametrize("override", ["solver.name=[1", "model=it's (x)", "model={"])
def test_malformed_value_is_named(override: str) -> None:
    message = message_of("model=m", override)
    assert repr(override) in message
    assert "quote" in message


def test_argument_that_is_no_setting() -> None:
    assert "unexpected argument 'trace.safetensors': expected key=value" in message_of("trace.safetensors")
    assert "unexpected argument '=1': expected key=value" in message_of("=1")


def test_number_in_place_of_a_preset_is_refused() -> None:
    assert "must be a string" in message_of("model=m", "cluster=8")


def test_unresolvable_reference_is_named() -> None:
    assert "nowhere" in message_of("model=m", "seed=${nowhere}")


def test_missing_file_is_named_with_the_presets() -> None:
    assert "cluster=none.yaml: no such file; name a YAML file or one of ['large', 'small']" in message_of(
        "cluster=none.yaml"
    )


@pytest.mark.parametrize("content", [b"nodes: [1", b"a: 1\na: 2\n", b"\xff\xfe\x00\x01", b"- 1\n- 2\n", b""])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert message_of("model=m", "cluster=bad.yaml").startswith("cluster=bad.yaml: ")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert message_of("model=m", "cluster=folder.yaml").startswith("cluster=folder.yaml: ")
