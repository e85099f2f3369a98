"""The demo model's trainer in miniature: it learns, and an interrupted run ends where an uninterrupted one does."""

import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from examples import train_demo_moe
from examples.demo_moe_optimizer import MasterAdamW

SETTINGS = {"steps": 5, "layers": 2, "experts": 4, "hidden": 64, "expert-hidden": 16, "vocabulary": 320}
SETTINGS |= {"context": 32, "sequences": 4, "checkpoint-seconds": 0}
TINY = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of random words from two vocabularies."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    domains = {"letters": ["alpha", "beta", "gamma", "delta"], "numbers": ["one", "two", "three", "four"]}
    for name, words in domains.items():
        rows = [{"id": str(n), "text": " ".join(generator.choices(words, k=60))} for n in range(10)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.train.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    manifest = {"format": "demo-corpus", "version": 1, "domains": [{"name": name} for name in domains]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo_moe, "pick_device", lambda: torch.device("cpu"))


def train(corpus: Path, folder: Path, *more: str) -> int:
    command = ["--corpus", str(corpus), "--work", str(folder / "work"), "-o", str(folder / "model"), *TINY, *more]
    return train_demo_moe.main(command)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Float32 weights of a run's last checkpoint."""
    tensors = load_file(folder / "work" / "checkpoint.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("master.")}


def interrupt_after(steps: int) -> Callable[[MasterAdamW, float], None]:
    """An optimizer step that is interrupted once ``steps`` of them are done."""
    step = MasterAdamW.step
    done = 0

    def interrupted(self: MasterAdamW, rate: float) -> None:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        step(self, rate)

    return interrupted


@pytest.mark.usefixtures("on_cpu")
def test_resumed_run_equals_an_uninterrupted_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert train(corpus, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(MasterAdamW, "step", interrupt_after(3))
        with pytest.raises(KeyboardInterrupt):
            train(corpus, tmp_path / "resumed")
    assert not (tmp_path / "resumed/model").exists()
    at_interruption = weights(tmp_path / "resumed")
    assert train(corpus, tmp_path / "resumed") == 0
    assert "starting at step 3" in capsys.readouterr().out

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.allclose(at_interruption[name], tensor, atol=1e-4) for name, tensor in whole.items())

    record = json.loads((tmp_path / "resumed/model/training.json").read_text())
    assert (record["steps"], record["tokens"]) == (5, 5 * 4 * 32)
    assert (tmp_path / "resumed/model/tokenizer.json").is_file()
    saved = load_file(tmp_path / "resumed/model/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


@pytest.mark.usefixtures("on_cpu")
def test_training_lowers_the_loss(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(corpus, tmp_path, "--steps", "40", "--report-seconds", "0", "--checkpoint-seconds", "60") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    losses = [float(line.split("  loss ")[1].split()[0]) for line in lines]
    assert len(losses) == 40
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.usefixtures("on_cpu")
def test_checkpoint_of_other_settings_is_refused_in_one_line(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    assert train(corpus, tmp_path, "--steps", "1") == 0
    capsys.readouterr()
    assert train(corpus, tmp_path, "--steps", "2", "--seed", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert error.endswith("is of other settings: repeat them, or give an empty --work folder")


@pytest.mark.usefixtures("on_cpu")
def test_missing_corpus_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    assert train(tmp_path / "nowhere", tmp_path) == 2
    assert "run python -m examples.build_corpus" in capsys.readouterr().err


def test_balance_weight_and_learning_rate_follow_their_schedules() -> None:
    assert train_demo_moe.balance_weight(0, 0.01) == pytest.approx(0.1)
    assert train_demo_moe.balance_weight(0.05, 0.01) == pytest.approx(0.055)
    assert train_demo_moe.balance_weight(0.1, 0.01) == train_demo_moe.balance_weight(1, 0.01) == pytest.approx(0.01)
    assert train_demo_moe.learning_rate(0.03, 1.0) == pytest.approx(1.0)
    assert train_demo_moe.learning_rate(1.0, 1.0) == pytest.approx(0.02)
