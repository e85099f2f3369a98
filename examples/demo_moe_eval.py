"""Measure the demo model on held-out text: compression, expert popularity, inter-layer affinity, sample continuations.

    python -m examples.demo_moe_eval --model examples/demo-moe --corpus .corpus -o benchmarks/results/demo_moe.json

Writes one JSON file with flat rows; ``examples.demo_moe_card`` turns it into the model card.
"""

import argparse
import json
import lzma
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.build_corpus import write_atomically
from examples.demo_moe_data import DemoDataError, read_documents, read_manifest, token_bytes, token_stream
from examples.prompt_filters import is_harmless, is_in_language, may_be_shipped

MODEL, CORPUS, FIGURES = Path("examples/demo-moe"), Path(".corpus"), Path("benchmarks/results/demo_moe.json")
TRAIN_DOCUMENTS = 2000  # of each domain, for the unigram models
SAMPLE_PROMPT_TOKENS = 32
SAMPLE_NEW_TOKENS = 96


def mutual_information(left: np.ndarray, right: np.ndarray, experts: int) -> float:
    """Plug-in mutual information in bits of two expert ids, over all pairs of one choice left and one right.

    ``left`` and ``right``: integers ``[tokens, choices]`` of two layers.
    """
    joint = np.zeros((experts, experts))
    for a in range(left.shape[1]):
        for b in range(right.shape[1]):
            np.add.at(joint, (left[:, a], right[:, b]), 1.0)
    joint /= joint.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    present = joint > 0
    return float((joint[present] * np.log2(joint[present] / independent[present])).sum())


def unigram_bits(train: np.ndarray, held: np.ndarray, vocabulary: int) -> float:
    """Bits that ``held`` costs under add-one token frequencies of ``train``, both integer ``[tokens]``."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log2(counts / counts.sum())[held].sum())


def byte_unigram_bits_per_byte(train: bytes, held: bytes) -> float:
    """Bits per byte of ``held`` under add-one byte frequencies of ``train``."""
    counts = np.bincount(np.frombuffer(train, dtype=np.uint8), minlength=256) + 1.0
    costs = -np.log2(counts / counts.sum())
    return float(costs[np.frombuffer(held, dtype=np.uint8)].mean())


@torch.no_grad()
def score(model: Any, windows: torch.Tensor) -> tuple[float, np.ndarray]:
    """Total bits of ``windows[:, 1:]`` and the experts chosen, uint8 ``[tokens, layers, top_k]``."""
    bits, routes = 0.0, []
    for window in windows:
        tokens = window[None].to(model.device)
        output = model(input_ids=tokens[:, :-1], use_cache=False, output_router_logits=True)
        nats = functional.cross_entropy(output.logits[0].float(), tokens[0, 1:], reduction="sum")
        bits += nats.item() / np.log(2)
        chosen = [logits.topk(model.config.num_experts_per_tok).indices for logits in output.router_logits]
        routes.append(torch.stack(chosen, dim=1).to(torch.uint8).cpu().numpy())
    return bits, np.concatenate(routes)


def windows_of(stream: np.ndarray, context: int, limit: int) -> torch.Tensor:
    """At most ``limit`` whole windows of ``context + 1`` tokens, int64; a short stream gives one shorter window."""
    length = min(context + 1, len(stream))
    count = min(len(stream) // length, limit)
    return torch.from_numpy(stream[: count * length].astype(np.int64).reshape(count, length))


def evaluate_domain(
    name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace, vocabulary: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Row of compression figures of one domain, and its routes."""
    held = read_documents(arguments.corpus, name, "heldout")
    train = read_documents(arguments.corpus, name, "train", TRAIN_DOCUMENTS)
    held_stream, train_stream = token_stream(tokenizer, held), token_stream(tokenizer, train)
    windows = windows_of(held_stream, model.config.max_position_embeddings, arguments.windows)
    bits, routes = score(model, windows)
    scored = windows[:, 1:].numpy().ravel()
    size = int(token_bytes(tokenizer)[scored].sum())
    held_bytes = tokenizer.decode(windows.ravel(), skip_special_tokens=True).encode()
    train_bytes = "".join(row["text"] for row in train).encode()
    row = {
        "kind": "compression",
        "domain": name,
        "heldout_bytes": size,
        "heldout_tokens": len(scored),
        "model_bits_per_byte": bits / size,
        "token_unigram_bits_per_byte": unigram_bits(train_stream, scored, vocabulary) / size,
        "byte_unigram_bits_per_byte": byte_unigram_bits_per_byte(train_bytes, held_bytes),
        "xz_bits_per_byte": 8 * len(lzma.compress(held_bytes, preset=9)) / len(held_bytes),
    }
    return row, routes


def popularity_rows(routes: dict[str, np.ndarray], experts: int) -> Iterator[dict[str, Any]]:
    """Busiest expert over the mean, by layer, for every domain and for all domains weighted equally."""
    shares = {}
    for name, chosen in routes.items():
        counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen.transpose(1, 0, 2)])
        shares[name] = counts / counts.sum(1, keepdims=True)
    shares["all"] = np.mean(list(shares.values()), axis=0)
    for name, share in shares.items():
        for layer, row in enumerate(share):
            yield {
                "kind": "popularity",
                "domain": name,
                "layer": layer,
                "busiest_over_mean": float(row.max() * experts),
                "quietest_over_mean": float(row.min() * experts),
                "dead_experts": int((row == 0).sum()),
            }


def affinity_rows(routes: dict[str, np.ndarray], experts: int, seed: int) -> Iterator[dict[str, Any]]:
    """Mutual information of adjacent layers over all domains, with and without the tokens of one layer shuffled."""
    smallest = min(len(chosen) for chosen in routes.values())
    chosen = np.concatenate([part[:smallest] for part in routes.values()])
    order = np.random.default_rng(seed).permutation(len(chosen))
    for layer in range(chosen.shape[1] - 1):
        left, right = chosen[:, layer], chosen[:, layer + 1]
        yield {
            "kind": "affinity",
            "layer": layer,
            "tokens": len(chosen),
            "all_pairs_bits": mutual_information(left, right, experts),
            "all_pairs_shuffled_bits": mutual_information(left[order], right, experts),
            "top1_bits": mutual_information(left[:, :1], right[:, :1], experts),
            "top1_shuffled_bits": mutual_information(left[order, :1], right[:, :1], experts),
        }


def sample_prompt(documents: list[dict[str, str]], domain: str, tokenizer: Any) -> list[int]:
    """The first tokens of the first document that is suited for an example; DemoDataError where there is none."""
    for row in documents:
        opening = row["text"][:600]
        if (
            len(opening) > 400
            and may_be_shipped(row["id"])
            and is_in_language(opening, domain)
            and is_harmless(opening)
        ):
            ids: list[int] = tokenizer(opening).input_ids[:SAMPLE_PROMPT_TOKENS]
            while tokenizer.decode(ids).endswith("\ufffd"):  # the last token is a part of a character
                ids.pop()
            return ids
    raise DemoDataError(f"domain {domain} has no held-out document suited for a sample: build the corpus again")


def sample_rows(
    names: list[str], model: Any, tokenizer: Any, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One continuation per domain of the first tokens of a held-out document, sampled as the model folder's
    generation configuration says."""
    for name in names:
        prompt_ids = sample_prompt(read_documents(arguments.corpus, name, "heldout", 80), name, tokenizer)
        prompt = torch.tensor([prompt_ids], device=model.device)
        torch.manual_seed(arguments.seed)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=SAMPLE_NEW_TOKENS,
        )
        prompt_text = tokenizer.decode(prompt[0], skip_special_tokens=True)
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        yield {"kind": "sample", "domain": name, "prompt": prompt_text, "continuation": text}


def command_line(arguments: argparse.Namespace) -> str:
    """The command that makes these figures from a checkout; it names the usual folders, not this machine's."""
    options = f"--windows {arguments.windows}" + (f" --seed {arguments.seed}" if arguments.seed else "")
    return f"python -m examples.demo_moe_eval --model {MODEL} --corpus {CORPUS} -o {FIGURES} {options}"


def commit() -> str | None:
    """Commit of the working tree; None outside a git checkout or where git is missing."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rows, with what they were measured on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16 if device == "cuda" else "auto")
    model.set_experts_implementation("eager")
    if device == "cpu":  # float32 arithmetic on the bf16 weights: bf16 products are slow on most CPUs
        model = model.float()
    model = model.to(device).eval()
    names = [entry["name"] for entry in read_manifest(arguments.corpus)["domains"]]
    rows: list[dict[str, Any]] = []
    routes = {}
    for name in names:
        row, routes[name] = evaluate_domain(name, model, tokenizer, arguments, model.config.vocab_size)
        rows.append(row)
        print(
            f"{name:12s} {row['model_bits_per_byte']:.3f} bits per byte, xz {row['xz_bits_per_byte']:.3f}", flush=True
        )
    rows += popularity_rows(routes, model.config.num_experts)
    rows += affinity_rows(routes, model.config.num_experts, arguments.seed)
    rows += sample_rows(names, model, tokenizer, arguments)
    return {
        "command": command_line(arguments),
        "commit": commit(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else f"CPU, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "training": json.loads((arguments.model / "training.json").read_text(encoding="utf-8")),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out text.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("-o", "--output", type=Path, default=FIGURES, help="JSON file of the figures")
    parser.add_argument("--windows", type=int, default=12, help="windows of the context's length per domain")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    try:
        if not (arguments.model / "training.json").is_file():
            raise DemoDataError(
                f"{arguments.model} holds no training.json: train with python -m examples.train_demo_moe"
            )
        figures = evaluate(arguments)
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    write_atomically(arguments.output, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
