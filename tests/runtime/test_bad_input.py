"""Bad input to the runtime's command line: exit code 2, one line, no traceback, nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime.__main__ import main
from tests.support.plans import make_plan
from tests.support.tiny_models import MAX_POSITIONS, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

PROJECT = Path(__file__).resolve().parents[2]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for ranks in (1, 2):
        make_plan(str(folder / "model"), "contiguous", ranks).save(folder / f"plan{ranks}.json")
    return folder


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The launcher's variables and the command line are the process's; give them back."""
    monkeypatch.setattr(sys, "argv", ["runtime"])
    before = dict(os.environ)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def run(*arguments: str) -> str:
        code = main(arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("INFO", "WARNING"))]
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def changed_plan(folder: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], str]:
    def write(change: Callable[[Any], None]) -> str:
        document = json.loads((folder / "plan1.json").read_text())
        change(document)
        (tmp_path / "plan.json").write_text(json.dumps(document))
        return str(tmp_path / "plan.json")

    return write


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("port=abc", ["port=abc", "0 to 65535"]),
        ("port=70000", ["port 70000", "0 to 65535"]),
        ("port=1.5", ["port=1.5", "integer"]),
        ("port=null", ["port=None", "integer"]),
        ("host=5", ["host=5", "address"]),
        ("served_model_name=5", ["served_model_name=5", "text"]),
        ("max_sequences=0", ["max_sequences=0", "at least 1"]),
        ("max_sequences=1.5", ["max_sequences=1.5", "integer"]),
        ("max_sequences=many", ["max_sequences=many", "integer"]),
        ("max_prefill_tokens=true", ["max_prefill_tokens=True", "integer"]),
        ("max_waiting=0", ["max_waiting=0", "at least 1"]),
        ("prefix_cache=some", ["prefix_cache=some", "true or false"]),
        ("rank_timeout_s=inf", ["rank_timeout_s=inf", "seconds"]),
        ("rank_timeout_s=nan", ["rank_timeout_s=nan", "seconds"]),
        ("rank_timeout_s=soon", ["rank_timeout_s=soon", "seconds"]),
        ("exchange=coherent", ["exchange=coherent", "allreduce"]),
        ("dtype=int8", ["dtype=int8", "bfloat16"]),
        ("device=tpu", ["device=tpu", "cpu"]),
        ("weights=none", ["weights=none", "random"]),
        ("model=5", ["model=5", "./5"]),
        ("model=/no/such/model", ["/no/such/model", "config.json"]),
        ("nosuch=1", ["nosuch", "conf/serve.yaml"]),
    ],
)
def test_settings(folder: Path, refused: Refused, setting: str, words: list[str]) -> None:
    line = refused("serve", "--plan", str(folder / "plan1.json"), setting)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("temperature=-1", ["temperature=-1", "from 0"]),
        ("temperature=hot", ["temperature=hot", "number"]),
        ("temperature=nan", ["temperature=nan", "number"]),
        ("top_p=0", ["top_p=0", "above 0"]),
        ("top_p=1.5", ["top_p=1.5", "at most 1"]),
        ("seed=18446744073709551616", ["seed=18446744073709551616", "64-bit"]),
        ("max_tokens=0", ["max_tokens=0", "at least 1"]),
    ],
)
def test_sampling_settings(folder: Path, refused: Refused, setting: str, words: list[str]) -> None:
    line = refused("generate", "--plan", str(folder / "plan1.json"), "--prompt", "x", setting)
    assert all(word in line for word in words), line


def test_missing_plan(refused: Refused) -> None:
    assert "/no/plan.json: No such file" in refused("serve", "--plan", "/no/plan.json")


@pytest.mark.parametrize("content", ["{", "[]", "null", "\xff\xfe"])
def test_plan_that_is_not_a_plan(refused: Refused, tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_bytes(content.encode("latin-1"))
    assert "plan.json" in refused("serve", "--plan", str(tmp_path / "plan.json"))


def _drop_expert_0(document: Any) -> None:
    document["slots"][0] = [[expert for expert in gpu if expert] for gpu in document["slots"][0]]


def _drop_layer(document: Any) -> None:
    document["layer_ids"].pop()
    document["slots"].pop()


def _add_expert(document: Any) -> None:
    document["num_experts"] += 1
    for layer in document["slots"]:
        layer[0].append(8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(version=2), ["version 2", "solve again"]),
        (lambda plan: plan.update(format="trace"), ["placement-plan"]),
        (lambda plan: plan.update(model_fingerprint="0" * 64), ["fingerprint 000000000000", "solve again"]),
        (lambda plan: plan["workload"].update(exchange="coherent"), ["coherent", "exchange=allreduce"]),
        (lambda plan: plan.update(model="./elsewhere"), ["elsewhere", "no such"]),
        (_drop_expert_0, ["expert"]),
        (_drop_layer, ["[0, 1] MoE layers", "[0, 1, 2]"]),
        (_add_expert, ["9 experts", "model has 8"]),
    ],
)
def test_plan_that_does_not_fit(refused: Refused, changed_plan: Any, change: Any, words: list[str]) -> None:
    line = refused("serve", "--plan", changed_plan(change))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": "many"}, ["num_experts", "many"]),
        ({"model_type": "nosuch"}, ["nosuch"]),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["no MoE layer"]),
        ({"num_attention_heads": 0, "head_dim": None}, ["config.json"]),
    ],
)
def test_config_that_is_no_moe(
    folder: Path, refused: Refused, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    config = json.loads((folder / "model" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused("serve", "--plan", str(folder / "plan1.json"), f"model={tmp_path}")
    assert all(word in line for word in words), line


def _without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", 100_000)


def _garbage(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 1000)


def _without_a_tensor(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [_without_weights, _truncated, _garbage, _without_a_tensor])
def test_damaged_weights(folder: Path, refused: Refused, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    damage(model)
    assert str(model) in refused("generate", "--plan", str(folder / "plan1.json"), "--prompt", "x", f"model={model}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu(folder: Path, refused: Refused) -> None:
    line = refused("generate", "--plan", str(folder / "plan2.json"), "--prompt", "x", "device=cuda")
    assert "device=cpu" in line


def test_port_in_use(folder: Path, refused: Refused) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused("serve", "--plan", str(folder / "plan1.json"), f"port={port}", "model=" + str(folder / "model"))
    assert f":{port}" in line
    assert "in use" in line


def test_prompt_beyond_the_context(folder: Path, refused: Refused) -> None:
    line = refused("generate", "--plan", str(folder / "plan1.json"), "--prompt", "x" * 200, "max_tokens=100")
    assert "200 tokens" in line
    assert str(MAX_POSITIONS) in line


def test_generate_writes_what_transformers_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "The expert", "max_tokens=20", "temperature=0", "device=cpu"]
    assert main(["generate", "--plan", str(folder / "plan1.json"), *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ids = torch.tensor([tiny_tokenizer()("The expert")["input_ids"]])
    answer = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert capsys.readouterr().out == tiny_tokenizer().decode(answer, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("only_rank_1", [False, True])
def test_damaged_weights_on_two_ranks(folder: Path, tmp_path: Path, only_rank_1: bool) -> None:
    """The command says once what is wrong, whether all ranks meet it or one that is not rank 0."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    if only_rank_1:  # the contiguous plan gives it experts 4 to 7
        _without_a_tensor(model)
    else:
        _truncated(model)
    command = [sys.executable, "-m", "runtime", "generate", "--plan", str(folder / "plan2.json"), "--prompt", "x"]
    done = subprocess.run(
        [*command, f"model={model}", "device=cpu"],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # gloo's threads may say that they were cut off when a rank leaves the other behind: no line of this program.
    noise = ("INFO", "terminate called without an active exception")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(noise)]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: rank 1: model" if only_rank_1 else "error: model")


def test_bench_refuses_its_output_before_any_rank_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "missing" / "rows.json"
    assert main(["bench", "decode", "--plan", str(tmp_path / "plan.json"), "-o", str(output)]) == 2
    assert str(output) in capsys.readouterr().err
