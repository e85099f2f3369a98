"""``python -m profiler``: a trace from end to end, and every kind of bad input told in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from profiler.__main__ import main
from profiler.fingerprint import model_fingerprint
from profiler.recorder import record_routes
from profiler.trace_format import RoutingTrace
from tests.support.tiny_models import tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.traces import random_sequences, write_trace

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["def f(x):", "The law says", "x", "return x + 1 if x else 0", "shall be"]
DOMAINS = ["code", "law", "code", "code", "law"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("deepseek_v3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": t, "domain": d}) for t, d in zip(TEXTS, DOMAINS, strict=True)]
    path.write_text("\n".join(lines))
    return path


def run_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "profiler", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_trace_from_end_to_end(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    settings = ["batch_size=2", "max_new_tokens=5", "token_ids=true", "gate_ahead=true", "device=cpu"]
    done = run_process(
        tmp_path, "trace", f"model={model_folder}", "prompts=prompts.jsonl", "-o", "trace.safetensors", *settings
    )
    assert done.returncode == 0, done.stderr
    assert "top-2 of 8" in done.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["prompts.jsonl", "trace.safetensors"]

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    ids = [tiny_tokenizer()(text)["input_ids"] for text in TEXTS]
    expected = list(record_routes(model, ids, batch_size=2, max_new_tokens=5, gate_ahead=True))
    with RoutingTrace.open(tmp_path / "trace.safetensors") as trace:
        assert trace.model == str(model_folder)
        assert trace.model_fingerprint == model_fingerprint(str(model_folder))
        assert trace.expert_bytes == 3 * 32 * 24 * 4
        assert (trace.layer_ids, trace.domains) == ((1, 2), tuple(DOMAINS))
        assert "prompts.jsonl: 5 prompts" in trace.metadata["source"]
        np.testing.assert_array_equal(trace.experts(), np.concatenate([routes.experts for routes in expected]))
        np.testing.assert_array_equal(trace.weights(), np.concatenate([routes.weights for routes in expected]))
        np.testing.assert_array_equal(trace.token_ids(), np.concatenate([routes.token_ids for routes in expected]))
        np.testing.assert_array_equal(trace.gate_ahead(), np.concatenate([routes.gate_ahead for routes in expected]))
        np.testing.assert_array_equal(trace.decode(), np.concatenate([routes.decode for routes in expected]))
        np.testing.assert_array_equal(trace.sequence(), np.repeat(np.arange(5), [len(r.experts) for r in expected]))


def test_settings_reach_the_recording(model_folder: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    settings = ["limit=2", "max_new_tokens=1", "max_prompt_tokens=4", "weights=false", "dtype=bfloat16", "device=cpu"]
    assert main(["trace", f"model={model_folder}", f"prompts={prompts}", "--output", str(output), *settings]) == 0
    with RoutingTrace.open(output) as trace:
        assert (trace.num_tokens, trace.num_sequences) == (8, 2)
        assert (trace.has_weights, trace.has_token_ids, trace.has_gate_ahead) == (False, False, False)
        assert trace.expert_bytes == 3 * 32 * 24 * 2


def test_info_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_trace(tmp_path / "t.safetensors", random_sequences([30, 30]), domains=["code", "law"])
    assert main(["info", str(path)]) == 0
    assert "60 (30 prefill, 30 decode)" in capsys.readouterr().out
    assert main(["stats", str(path), "-o", str(tmp_path / "s.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "per layer" in shown
    assert "law" in shown
    assert load_file(tmp_path / "s.safetensors")["affinity"].shape == (2, 8, 8)


def dense_model(folder: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=128, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def drop_weights(folder: Path) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    weights = load(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MODEL_ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
    "unknown family": (lambda folder: change_config(folder, model_type="nonesuch"), "configuration cannot be loaded"),
    "nonsense config": (lambda folder: change_config(folder, hidden_size="wide"), "configuration cannot be loaded"),
    "no tokenizer": (lambda folder: [p.unlink() for p in folder.glob("token*")], "tokenizer cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "weights cannot be loaded"),
    "truncated weights": (truncate_weights, "weights cannot be loaded"),
    "weights of other shapes": (lambda folder: change_config(folder, vocab_size=7), "have another shape"),
    "missing weights": (drop_weights, "lacks 1 weights such as model.norm.weight"),
    "dense model": (dense_model, "LlamaForCausalLM has no MoE layer"),
}


@pytest.mark.parametrize("name", MODEL_ERRORS)
def test_models_that_cannot_be_used(
    name: str, model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = MODEL_ERRORS[name]
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model")
    output = tmp_path / "t.safetensors"
    assert main(["trace", f"model={tmp_path / 'model'}", f"prompts={prompts}", "-o", str(output), "device=cpu"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "prompts.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=./missing"], "./missing: no such model folder"),
        (["prompts=missing.jsonl"], "missing.jsonl: cannot be read"),
        (["batch_size=0"], "batch_size=0: expected a whole number >= 1"),
        (["max_new_tokens=many"], "max_new_tokens=many: expected a whole number"),
        (["max_new_tokens=250"], "exceed the context of 256; shorten it, or set max_prompt_tokens=6"),
        (["temperature=-1"], "temperature=-1: expected a number >= 0"),
        (["dtype=int8"], "dtype=int8: expected one of auto, float32, bfloat16, float16"),
        (["device=tpu"], "device=tpu: expected auto, cpu, cuda or cuda:N"),
        (["device=cuda:99"], "device=cuda:99: this machine has"),
        (["weights=maybe"], "weights=maybe: expected true or false"),
        (["nonsense=1"], "nonsense"),
        (["-o", "missing/t.safetensors"], "the folder missing does not exist"),
        (["-o", "prompts.jsonl"], "prompts.jsonl: is named twice"),
        (["-o", "x" * 250], "the name is too long"),
        (["seed=99999999999999999999"], "expected a whole number <= 9223372036854775807"),
        (["+seeds=1"], "unexpected argument '+seeds=1'"),
    ],
)
def test_settings_that_make_no_sense(
    arguments: list[str],
    message: str,
    model_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [f"model={model_folder}", "prompts=prompts.jsonl", "-o", "t.safetensors", *arguments]
    assert main(["trace", *given]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "model=./missing", "prompts=p.txt", "-o", "t.safetensors"], "./missing: no such model folder"),
        (["info", "p.txt"], "p.txt: not a safetensors file"),
        (["stats", "missing.safetensors"], "missing.safetensors: cannot be read"),
        (["stats", "p.txt", "x=1"], "stats takes no settings, but got x=1"),
    ],
)
def test_a_process_tells_bad_input_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "p.txt").write_text("some prompt\n")
    done = run_process(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.txt"]


def test_reading_traces_needs_no_torch() -> None:
    modules = (
        "trace_format",
        "statistics",
        "fingerprint",
        "tables",
        "summary",
        "trace_merge",
        "trace_sample",
        "__main__",
    )
    code = f"import sys, {', '.join(f'profiler.{module}' for module in modules)};"
    code += "print(sorted(name for name in ('torch', 'transformers') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("trace", "info", "stats", "report"):
        with pytest.raises(SystemExit) as caught:
            main([verb, "--help"])
        assert caught.value.code == 0
        assert f"example:\n  python -m profiler {verb} " in capsys.readouterr().out
