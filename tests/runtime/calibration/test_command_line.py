"""`python -m runtime calibrate` in real processes: a cluster file that `placement` solves with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf import compose
from placement.cluster import Cluster
from profiler.errors import InputError
from profiler.seam import find_moe_layers
from runtime.calibrate import CalibrationSettings
from runtime.calibrate import calibrate as run
from runtime.settings import EngineSettings
from tests.support.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[3]


def calibrate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command on CPUs."""
    command = [sys.executable, "-m", "runtime", "calibrate", "device=cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_cluster_file(saved_model: Callable[[str], str], tmp_path: Path) -> None:
    output = tmp_path / "cluster.yaml"
    result = calibrate(f"model={saved_model('gpt_oss')}", "gpus=2", "name=here", "-o", str(output))
    assert result.returncode == 0, result.stderr
    cluster = Cluster.from_dict(yaml.safe_load(output.read_text()))
    layer = find_moe_layers(tiny_model("gpt_oss"))[0]
    listed = cluster.coefficients[0]
    assert (cluster.name, cluster.num_gpus, listed.expert_bytes) == ("here", 2, layer.expert_bytes)
    assert {listed.c0_us.source, listed.c1_us.source, listed.c2_us.source} == {"measured"}
    assert listed.c0_us.value + listed.c1_us.value > 0
    assert cluster.coefficients_for(listed.expert_bytes, listed.hidden_state_bytes) == listed
    assert cluster.intra_node.latency_s > 0
    assert "within" in result.stdout
    config = compose("solve", [f"cluster={output}"])
    assert config["cluster"]["coefficients"][0]["c1_us"]["source"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("model=no/such/model", "-o", "x.yaml"), "no/such/model"),
        (("model=no/such/model", "gpus=2", "-o", "x.yaml"), "no/such/model"),
        (("model=examples/demo-moe", "gpus=2", f"kv_reserve_bytes={10**15}", "-o", "x.yaml"), "lower the reserve"),
        (("-o", "x.yaml"), "model is not set"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], named: str) -> None:
    result = calibrate(*arguments)
    assert result.returncode == 2
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "setting", [{"gpus": 0}, {"gpus": True}, {"gpus": 1.5}, {"kv_reserve_bytes": -1}, {"kv_reserve_bytes": "1"}]
)
def test_settings(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        CalibrationSettings("model", **setting)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no/such/folder"):
        run(CalibrationSettings("model"), EngineSettings(), "no/such/folder/x.yaml")
