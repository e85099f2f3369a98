"""Write the demo model's card from the figures that ``examples.demo_moe_eval`` measured.

python -m examples.demo_moe_card --figures benchmarks/results/demo_moe.json --corpus .corpus -o examples/demo-moe
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from examples.build_corpus import write_atomically
from examples.demo_moe_data import DemoDataError, read_manifest
from examples.demo_moe_eval import TRAIN_DOCUMENTS

Rows = list[dict[str, Any]]


def table(heading: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in [heading, ["---"] * len(heading), *rows]]


def compression(rows: Rows) -> list[str]:
    """Section on bits per byte."""
    names = ("model", "token_unigram", "byte_unigram", "xz")
    cells = [
        [row["domain"], f"{row['heldout_bytes'] / 1e3:.0f}", *(f"{row[f'{name}_bits_per_byte']:.2f}" for name in names)]
        for row in rows
        if row["kind"] == "compression"
    ]
    return [
        "## Bits per byte on held-out text",
        "",
        f"The unigram models know the frequencies of tokens or bytes in {TRAIN_DOCUMENTS:,} documents of the domain's"
        " training text. `xz -9` compresses the same held-out text as one file, without having seen the training text.",
        "",
        *table(["domain", "held-out kB", "model", "token unigram", "byte unigram", "xz"], cells),
    ]


def popularity(rows: Rows) -> list[str]:
    """Section on expert popularity."""
    skew: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "popularity":
            skew.setdefault(row["domain"], []).append(row["busiest_over_mean"])
    layers = len(next(iter(skew.values())))
    cells = [[name, *(f"{value:.2f}" for value in values)] for name, values in skew.items()]
    dead = sum(row["dead_experts"] for row in rows if row["kind"] == "popularity" and row["domain"] == "all")
    return [
        "## Expert popularity",
        "",
        "Choices of the busiest expert over the mean of its layer; `all` weighs the domains equally. Experts that no",
        f"held-out token chooses: {dead}.",
        "",
        *table(["domain", *(f"layer {layer}" for layer in range(layers))], cells),
    ]


def affinity(rows: Rows) -> list[str]:
    """Section on the affinity between layers."""
    names = ("all_pairs", "all_pairs_shuffled", "top1", "top1_shuffled")
    cells = [
        [f"{row['layer']} to {row['layer'] + 1}", *(f"{row[f'{name}_bits']:.4f}" for name in names)]
        for row in rows
        if row["kind"] == "affinity"
    ]
    return [
        "## Inter-layer affinity",
        "",
        "Mutual information, in bits, between a token's experts in adjacent layers: over all pairs of one choice in",
        "each layer, and between the first choices. The control shuffles the tokens of one of the two layers.",
        "",
        *table(["layers", "all pairs", "all pairs, shuffled", "first choices", "first choices, shuffled"], cells),
    ]


def samples(rows: Rows) -> list[str]:
    """Section of one continuation per domain."""
    lines = ["## Samples", "", "The beginning of a held-out document, then (after `⏵`) what the model writes.", ""]
    for row in rows:
        if row["kind"] == "sample":
            text = (row["prompt"] + "⏵" + row["continuation"]).replace("```", "'''")
            lines += [f"**{row['domain']}**", "", "```text", *text.splitlines(), "```", ""]
    return lines


def sources_table(manifest: dict[str, Any]) -> list[str]:
    """Table of the training text: packages, licences, size."""
    cells = [
        [
            entry["name"],
            entry["title"],
            ", ".join(f"{source['package']} ({source['manager']})" for source in entry["sources"]),
            "; ".join(dict.fromkeys(source["licence"] for source in entry["sources"])),
            f"{entry['train']['text_bytes'] / 1e6:.1f}",
        ]
        for entry in manifest["domains"]
    ]
    return table(["domain", "text", "package", "licence of the text", "MB"], cells)


def description(config: dict[str, Any], training: dict[str, Any]) -> list[str]:
    """Sections on the architecture and on how it was trained."""
    settings = training["settings"]
    experts = config.get("num_experts", config.get("num_local_experts"))  # the name changed between versions
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    return [
        "## Architecture",
        "",
        f"`{config['architectures'][0]}`: {config['num_hidden_layers']} layers, all MoE, {experts} experts,"
        f" top-{config['num_experts_per_tok']} with softmax weights normalised over the chosen;"
        f" hidden size {config['hidden_size']}, expert size {config['moe_intermediate_size']},"
        f" {config['num_attention_heads']} attention heads over {config['num_key_value_heads']} key/value heads of"
        f" {config['head_dim']}, context {config['max_position_embeddings']}, vocabulary {config['vocab_size']}"
        " (byte-level BPE trained on the same text), tied embeddings, bf16.",
        "",
        "## Training",
        "",
        f"{training['steps']:,} steps of {settings['sequences']} sequences of {settings['context']} tokens,"
        f" {training['tokens'] / 1e6:.0f} million tokens in {training['seconds'] / 60:.1f} minutes on one"
        f" {training['device']} ({versions}), seed {settings['seed']}. The text has"
        f" {sum(training['training_tokens'].values()) / 1e6:.0f} million tokens; domains are drawn with probability"
        f" proportional to tokens^{settings['temperature']}. AdamW on float32 copies of the bf16 weights, learning"
        f" rate {settings['learning_rate']:g} at its peak, cosine decay.",
        "",
        "The load-balancing loss is that of Qwen3-MoE, but taken layer by layer over the batch and averaged, where"
        " Transformers pools the layers first (an expert idle in one layer would be excused by being busy in another)."
        f" Its weight is {settings['balance']:g}, ten times that at the start, falling linearly over the first tenth of"
        " the training, to keep every expert in use until the hidden states tell tokens apart.",
        "",
        "Train it again: `python -m examples.build_corpus`, then `python -m examples.train_demo_moe` (see `--help`).",
    ]


FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: [en, de, fr, pl, ru, ja, zh]
tags: [mixture-of-experts]
---
# demo-moe

A small Mixture-of-Experts language model that lets expertplan be tried without downloading weights: it routes as larger
models do, with domain-dependent expert popularity and affinity between layers.

**Licence.** The weights and the tokenizer are expertplan's own work and under Apache-2.0, like the project. They were
trained on the texts listed under Training text, each under its own licence; no text is contained in this folder but the
short samples at the end of this page, which keep the licences of their sources (the texts of these licences are in
`examples/prompts/licences`).

**Limits.** It writes text in the manner of its domains and knows nothing: what it says is mostly false, it repeats
itself, and it takes up the views and prejudices of its sources, among them political essays and scripture. No answer of
it is meant for use. The chat template (`User: …` and `Assistant:` lines) lets the chat endpoint be tried; the model is
not trained on dialogues.
"""


def card(figures: dict[str, Any], manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """The whole model card."""
    rows = figures["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        FRONT_MATTER,
        *description(config, figures["training"]),
        "",
        "## Training text",
        "",
        "About 97% of the documents; the figures below are measured on the beginning of the rest.",
        "",
        *sources_table(manifest),
        "",
        *compression(rows),
        "",
        *popularity(rows),
        "",
        *affinity(rows),
        "",
        f"Measured with `{figures['command']}` on: {figures['device']} ({versions}).",
        "",
        *samples(rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Command line; 0 on success, 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description="Write the demo model's card.")
    parser.add_argument("--figures", type=Path, default=Path("benchmarks/results/demo_moe.json"))
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("-o", "--output", type=Path, default=Path("examples/demo-moe"), help="folder of the model")
    arguments = parser.parse_args(argv)
    try:
        for path in (arguments.figures, arguments.output / "config.json"):
            if not path.is_file():
                raise DemoDataError(f"{path} not found: train and evaluate the demo model first")
        figures = json.loads(arguments.figures.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(arguments.output).to_dict()
        text = card(figures, read_manifest(arguments.corpus), config)
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomically(arguments.output / "README.md", text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
