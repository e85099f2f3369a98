"""Train the bundled demo model: a small Qwen3-MoE over many clearly different domains, on one GPU.

    python -m examples.build_corpus --output .corpus
    python -m examples.train_demo_moe --corpus .corpus --work work --output examples/demo-moe --minutes 7

Every step's batch depends on the seed and the step alone, so a run that was interrupted goes on from its last
checkpoint in ``--work`` (model, optimizer, step, elapsed time) with the same data. With ``--minutes`` the learning rate
decays over wall-clock time, with ``--steps`` over steps; where both are given, over whichever ends first.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from examples.build_corpus import write_atomically
from examples.demo_moe_data import DemoDataError, read_all, token_stream, train_tokenizer
from examples.demo_moe_model import Settings, build_model, losses, save_model, use_grouped_experts
from examples.demo_moe_optimizer import MasterAdamW

CHECKPOINT = "checkpoint.safetensors"


def prepare(settings: Settings, corpus: Path, work: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Tokenizer and training streams (uint16 ``[tokens]`` by domain); kept in ``work`` for a resumed run."""
    streams_file = work / "streams.safetensors"
    if streams_file.is_file():
        return AutoTokenizer.from_pretrained(work / "tokenizer"), load_file(streams_file)
    started = time.monotonic()
    documents = read_all(corpus, "train", settings.max_documents)
    print(f"[{time.monotonic() - started:6.1f} s] corpus read", flush=True)
    tokenizer = train_tokenizer(documents, settings.vocabulary, settings.tokenizer_bytes)
    tokenizer.model_max_length = settings.context
    tokenizer.save_pretrained(work / "tokenizer")
    print(f"[{time.monotonic() - started:6.1f} s] tokenizer trained: {len(tokenizer)} tokens", flush=True)
    streams = {name: token_stream(tokenizer, rows) for name, rows in documents.items()}
    total = sum(len(stream) for stream in streams.values())
    print(f"[{time.monotonic() - started:6.1f} s] {total / 1e6:.1f} million training tokens", flush=True)
    for name, stream in streams.items():
        if len(stream) <= settings.context:
            raise DemoDataError(f"domain {name} has {len(stream)} tokens, need more than {settings.context}: add text")
    save_file(streams, work / "streams.safetensors.tmp")
    os.replace(work / "streams.safetensors.tmp", streams_file)
    return AutoTokenizer.from_pretrained(work / "tokenizer"), streams


class Batches:
    """Training batches; each sequence is a random window of one domain's stream, chosen by (seed, step) alone."""

    def __init__(self, streams: dict[str, np.ndarray], settings: Settings, device: torch.device) -> None:
        sizes = np.array([len(stream) for stream in streams.values()])
        shares = sizes**settings.temperature
        self._edges = np.cumsum(shares / shares.sum())
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._sizes, self._settings = sizes, settings
        flat = np.concatenate(list(streams.values())).astype(np.int16)  # below 32768: int16 holds every id
        self._tokens = torch.from_numpy(flat).to(device)
        self._offsets = torch.arange(settings.context + 1, device=device)

    def __getitem__(self, step: int) -> torch.Tensor:
        """int64 ``[sequences, context + 1]`` on the device. Domains are drawn systematically, so that the shares of a
        batch are as near to the wanted ones as whole sequences allow."""
        generator = np.random.default_rng((self._settings.seed, step))
        count = self._settings.sequences
        points = (np.arange(count) + generator.random()) / count
        domains = np.minimum(np.searchsorted(self._edges, points), len(self._edges) - 1)
        room = self._sizes[domains] - self._settings.context
        starts = self._starts[domains] + (generator.random(count) * room).astype(np.int64)
        return self._tokens[torch.from_numpy(starts).to(self._tokens.device)[:, None] + self._offsets].long()


def learning_rate(progress: float, peak: float) -> float:
    """Linear rise over the first 3%, then a half cosine down to 2% of ``peak``. ``progress`` runs from 0 to 1."""
    if progress < 0.03:
        return peak * max(progress / 0.03, 0.01)
    return peak * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(1.0, (progress - 0.03) / 0.97))))


def balance_weight(progress: float, final: float) -> float:
    """Weight of the balancing loss: ten times ``final`` at the start, ``final`` from a tenth of the run on.

    Before the hidden states tell tokens apart, a router sends nearly all of them to the same experts, and experts
    that get no tokens then do not learn; a strong balancing loss in that phase keeps every expert in use.
    """
    return final * (1 + 9 * max(0.0, 1 - 10 * progress))


def progress_line(
    step: int, elapsed: float, entropy: float, balance: float, speed: float, rate: float, loads: Any
) -> str:
    """One line: loss, speed and, per layer, the busiest expert over the mean; dead experts (no token) in all."""
    skew = " ".join(f"{layer.max() / layer.mean():.1f}" for layer in loads)
    dead = int((loads == 0).sum())
    return (
        f"step {step:6d}  {elapsed:6.1f} s  loss {entropy:.4f}  balance {balance:.3f}  lr {rate:.2e}"
        f"  {speed / 1e3:.0f}k tokens/s  max/mean load {skew}  dead {dead}"
    )


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU with a line that says so."""
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name(0)}", flush=True)
        return torch.device("cuda", 0)
    print("device: CPU (no CUDA device found: training takes hours instead of minutes)", flush=True)
    return torch.device("cpu")


def run_steps(
    model: Any,
    optimizer: MasterAdamW,
    batches: Batches,
    settings: Settings,
    arguments: argparse.Namespace,
    resumed: tuple[int, float],
) -> tuple[int, float]:
    """Train until the steps or the time are used up, with checkpoints; (step, seconds trained), as ``resumed`` is."""
    step, before = resumed
    budget = arguments.minutes * 60 if arguments.minutes else float("inf")
    last_step = arguments.steps or float("inf")
    started = reported = saved = time.monotonic()
    reported_step = step
    until = started + (arguments.stop_after * 60 if arguments.stop_after else float("inf"))
    while True:
        now = time.monotonic()
        elapsed = before + now - started
        progress = max(elapsed / budget, step / last_step)
        if progress >= 1 or now >= until:
            break
        rate = learning_rate(progress, settings.learning_rate)
        entropy, balance, loads = losses(model, batches[step])
        (entropy + balance_weight(progress, settings.balance) * balance).backward()
        optimizer.step(rate)
        step += 1
        if now - reported >= arguments.report_seconds or step == 1:
            values = entropy.item(), balance.item()  # waits for the device, so that the speed is of finished work
            speed = (step - reported_step) * settings.sequences * settings.context / (time.monotonic() - reported)
            print(progress_line(step, elapsed, *values, speed, rate, loads.cpu()), flush=True)
            if not np.isfinite(values[0]):
                raise DemoDataError(f"loss is {values[0]} at step {step}: lower --learning-rate")
            reported, reported_step = time.monotonic(), step
        if now - saved >= arguments.checkpoint_seconds:
            optimizer.save(arguments.work / CHECKPOINT, step, elapsed, vars(settings))
            saved = time.monotonic()
    optimizer.save(arguments.work / CHECKPOINT, step, elapsed, vars(settings))
    return step, elapsed


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """Prepare, train (from the checkpoint where there is one), save the model folder and what it was trained on."""
    device = pick_device()
    tokenizer, streams = prepare(settings, arguments.corpus, arguments.work)
    model = build_model(settings, tokenizer, device)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    checkpoint = arguments.work / CHECKPOINT
    resumed = optimizer.load(checkpoint, vars(settings)) if checkpoint.is_file() else (0, 0.0)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} million parameters; starting at step {resumed[0]}", flush=True)
    batches = Batches(streams, settings, device)
    if device.type == "cuda":  # on a CPU the grouped product is the slower one
        use_grouped_experts(model, batches[0][:4, :300])
    step, elapsed = run_steps(model, optimizer, batches, settings, arguments, resumed)
    save_model(model, tokenizer, arguments.output)
    tokens = step * settings.sequences * settings.context
    record = {
        "steps": step,
        "seconds": round(elapsed, 1),
        "tokens": tokens,
        "training_tokens": {name: len(stream) for name, stream in streams.items()},
        "settings": vars(settings),
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomically(arguments.output / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"saved {arguments.output} after {step} steps, {tokens / 1e6:.1f} million tokens", flush=True)


def parse(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """Command line to settings of the model and of the run."""
    parser = argparse.ArgumentParser(
        description="Train the bundled demo MoE.",
        epilog="example: python -m examples.train_demo_moe --corpus .corpus --work work -o demo-moe --minutes 7",
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder that examples.build_corpus wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder of token streams and checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--minutes", type=float, help="training time, over all resumed runs together")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--stop-after", type=float, help="minutes after which this run stops, to be resumed")
    parser.add_argument("--report-seconds", type=float, default=10.0)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    for name, value in vars(Settings()).items():
        kind = int if value is None else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"default {value}")
    arguments = parser.parse_args(argv)
    if not arguments.minutes and not arguments.steps:
        parser.error("give --minutes or --steps: how long to train")
    return Settings(**{name: getattr(arguments, name) for name in vars(Settings())}), arguments


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 with one line on stderr for bad input."""
    settings, arguments = parse(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        train(settings, arguments)
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
