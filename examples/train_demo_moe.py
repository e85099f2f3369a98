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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from examples.demo_moe_data import DemoDataError, read_all, token_stream, train_tokenizer
from examples.demo_moe_optimizer import MasterAdamW


@dataclass(frozen=True)
class Settings:
    """What defines a run; stored beside the checkpoint, and a resumed run must have the same."""

    seed: int = 0
    layers: int = 8
    experts: int = 16
    hidden: int = 256
    expert_hidden: int = 96
    vocabulary: int = 8192
    context: int = 2048
    sequences: int = 32
    learning_rate: float = 2e-3
    balance: float = 0.01
    # Domains are drawn with probability proportional to tokens ** temperature: between equal and proportional shares.
    temperature: float = 0.35
    tokenizer_bytes: int = 3_000_000
    max_documents: int | None = None


def model_config(settings: Settings, tokenizer: Any) -> Qwen3MoeConfig:
    """Qwen3-MoE in small: all layers MoE, top-2, grouped-query attention, tied embeddings."""
    return Qwen3MoeConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        moe_intermediate_size=settings.expert_hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 32,
        num_key_value_heads=settings.hidden // 64,
        head_dim=32,
        num_experts=settings.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=settings.balance,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


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


def losses(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats, load-balancing loss, and experts' loads (choices per token, float ``[layers, experts]``).

    The balancing loss is the architecture's, taken layer by layer over the whole batch: summed over layers first, an
    expert that is idle in one layer would be excused by being busy in another.
    """
    output = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
    entropy = functional.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    config = model.config
    balance = torch.stack(
        [
            load_balancing_loss_func((logits.float(),), config.num_experts, config.num_experts_per_tok)
            for logits in output.router_logits
        ]
    ).mean()
    with torch.no_grad():
        choices = torch.stack(
            [logits.topk(config.num_experts_per_tok).indices.flatten() for logits in output.router_logits]
        )
        loads = functional.one_hot(choices, config.num_experts).float().mean(1) * config.num_experts_per_tok
    return entropy, balance, loads


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


def build_model(settings: Settings, tokenizer: Any, device: torch.device) -> Any:
    """Model on ``device``: bf16 parameters on a GPU, float32 on a CPU, whose bf16 matrix products are slow.

    Buffers stay float32: a rotary table in bf16 would be wrong at far positions.
    """
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM._from_config(model_config(settings, tokenizer), dtype=torch.float32)
    model.set_experts_implementation("eager")
    if device.type == "cuda":
        parameters_to_bf16(model)
    return model.to(device).train()


def use_grouped_experts(model: Any, tokens: torch.Tensor) -> None:
    """Switch the experts to grouped matrix products where their gradients agree with the plain loop's.

    The loop over experts is the reference; where the grouped product of this PyTorch gives other gradients, it stays.
    """
    gradients = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        losses(model, tokens)[0].backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
        model.zero_grad(set_to_none=True)
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    kept = "grouped_mm" if error < 0.1 else "eager"
    model.set_experts_implementation(kept)
    print(f"experts: {kept} (gradients of grouped_mm differ by {error:.4f} from the loop's)", flush=True)


def parameters_to_bf16(model: Any) -> None:
    """Convert the parameters, not the buffers, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def train(settings: Settings, arguments: argparse.Namespace) -> None:
    """Prepare, train (from the checkpoint where there is one), save the model folder."""
    device = pick_device()
    tokenizer, streams = prepare(settings, arguments.corpus, arguments.work)
    model = build_model(settings, tokenizer, device)
    optimizer = MasterAdamW(model, weight_decay=0.1)
    checkpoint = arguments.work / "checkpoint.safetensors"
    step, before = optimizer.load(checkpoint, vars(settings)) if checkpoint.is_file() else (0, 0.0)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters; starting at step {step}",
        flush=True,
    )
    batches = Batches(streams, settings, device)
    if device.type == "cuda":  # on a CPU the grouped product is the slower one
        use_grouped_experts(model, batches[0][:4, :300])
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
            optimizer.save(checkpoint, step, elapsed, vars(settings))
            saved = time.monotonic()
    optimizer.save(checkpoint, step, elapsed, vars(settings))
    save_model(model, tokenizer, arguments.output)
    record = {"steps": step, "seconds": round(elapsed, 1), "tokens": step * settings.sequences * settings.context}
    record |= {"training_tokens": {name: len(stream) for name, stream in streams.items()}, "settings": vars(settings)}
    record["device"] = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    (arguments.output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"saved {arguments.output} after {step} steps, {record['tokens'] / 1e6:.1f} million tokens", flush=True)


def save_model(model: Any, tokenizer: Any, output: Path) -> None:
    """Hugging Face folder with bf16 shards of at most 10 MB; leftovers of an earlier model are removed."""
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.safetensors*"):
        old.unlink()
    parameters_to_bf16(model)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    model.save_pretrained(output, max_shard_size="10MB")
    tokenizer.save_pretrained(output)


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
