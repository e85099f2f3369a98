"""The bundled demo model on the bundled prompts: it loads offline, predicts text, and routes as it is meant to."""

import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo_moe_data import token_bytes
from examples.demo_moe_eval import mutual_information
from runtime.server.detokenizer import DetokenizerFactory

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "demo-moe"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model.eval()


def read_prompts(side: str) -> dict[str, list[str]]:
    prompts: dict[str, list[str]] = {}
    for line in (EXAMPLES / "prompts" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompts.setdefault(row["domain"], []).append(row["prompt"])
    return prompts


@pytest.fixture(scope="module")
def judged(model: Any, tokenizer: Any) -> dict[str, tuple[float, np.ndarray, np.ndarray]]:
    """Per domain of the judge prompts: bits, token ids ``[tokens]`` and routes ``[tokens, layers, top_k]``."""
    found = {}
    for domain, texts in read_prompts("judge").items():
        bits, ids, routes = 0.0, [], []
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                output = model(tokens, output_router_logits=True)
            bits += functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:], reduction="sum").item() / np.log(2)
            ids.append(tokens[0, 1:].numpy())
            chosen = [logits.topk(model.config.num_experts_per_tok).indices for logits in output.router_logits]
            routes.append(torch.stack(chosen, dim=1).numpy())
        found[domain] = bits, np.concatenate(ids), np.concatenate(routes)
    return found


def test_model_folder_loads_offline_and_is_small() -> None:
    program = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(MODEL)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(MODEL)!r})\n"
        "config = model.config\n"
        "print(model.dtype, config.num_hidden_layers, config.num_experts, config.num_experts_per_tok, len(tokenizer))\n"
        "print(sum(hasattr(layer.mlp, 'experts') for layer in model.model.layers))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    dtype, layers, experts, top_k, vocabulary, moe_layers = done.stdout.split()
    assert dtype == "torch.bfloat16"
    assert int(moe_layers) == int(layers) >= 8
    assert int(experts) >= 16
    assert int(top_k) == 2
    assert int(vocabulary) == 8192
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 30e6


def test_model_predicts_unseen_text_better_than_frequencies_and_xz(judged: Any, tokenizer: Any) -> None:
    lengths = token_bytes(tokenizer)
    for domain, texts in read_prompts("judge").items():
        bits, ids, _ = judged[domain]
        model_rate = bits / lengths[ids].sum()
        # Frequencies of the very tokens that are scored: a lower bound on any unigram model's cost.
        counts = np.bincount(ids)
        unigram_rate = -np.log2(counts[ids] / len(ids)).sum() / lengths[ids].sum()
        joined = "\n".join(texts).encode()
        xz_rate = 8 * len(lzma.compress(joined, preset=9)) / len(joined)
        assert model_rate < 0.5 * xz_rate, (domain, model_rate, xz_rate)
        assert model_rate < 0.75 * unigram_rate, (domain, model_rate, unigram_rate)


def test_no_expert_is_dead_and_popularity_depends_on_the_domain(judged: Any, model: Any) -> None:
    experts = model.config.num_experts
    shares = []
    for _, _, routes in judged.values():
        counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routes.transpose(1, 0, 2)])
        shares.append(counts / counts.sum(1, keepdims=True))
    overall = np.mean(shares, axis=0)
    assert overall.min() > 0
    assert (overall.max(1) * experts < 2.5).all()
    # Half the sum of absolute differences: the part of a domain's choices that would have to move elsewhere.
    distances = [np.abs(share - overall).sum(1).mean() / 2 for share in shares]
    assert min(distances) > 0.15


def test_choices_of_adjacent_layers_depend_on_each_other(judged: Any, model: Any) -> None:
    routes = np.concatenate([routes for _, _, routes in judged.values()])
    order = np.random.default_rng(0).permutation(len(routes))
    for layer in range(routes.shape[1] - 1):
        left, right = routes[:, layer], routes[:, layer + 1]
        assert mutual_information(left, right, model.config.num_experts) >= 0.3
        assert mutual_information(left[order], right, model.config.num_experts) < 0.05


def test_server_detokenizes_as_the_tokenizer_decodes(tokenizer: Any) -> None:
    generator = random.Random(0)
    factory = DetokenizerFactory(tokenizer)
    for _ in range(200):
        ids = [generator.randrange(len(tokenizer)) for _ in range(generator.randrange(40))]
        detokenizer = factory()
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_chat_template_marks_the_speakers(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|>User: Hello\nAssistant:"
