"""A checkpoint of a published Qwen3-MoE shape with random weights, laid out as on the hub: safetensors files and index.

    python -m benchmarks.random_checkpoint --shape qwen3-30b-a3b --tokenizer examples/demo-moe FOLDER

Every file has the same numbers: reading them takes as long as reading a trained model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch

SHAPES = Path(__file__).parent / "shapes"
STANDARD_DEVIATION = 0.02
ONE = b"\x80\x3f"  # in bfloat16
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """File number, name and shape of every tensor, as Qwen3-MoE checkpoints have them."""
    width, head, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield layers, "model.embed_tokens.weight", (config["vocab_size"], width)
    yield layers, "lm_head.weight", (config["vocab_size"], width)
    yield layers, "model.norm.weight", (width,)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield layer, f"{name}.self_attn.{part}_proj.weight", (rows, width)
        yield layer, f"{name}.self_attn.o_proj.weight", (width, queries)
        for part in ("q", "k"):
            yield layer, f"{name}.self_attn.{part}_norm.weight", (head,)
        for part in ("input", "post_attention"):
            yield layer, f"{name}.{part}_layernorm.weight", (width,)
        yield layer, f"{name}.mlp.gate.weight", (config["num_experts"], width)
        for expert in range(config["num_experts"]):
            for part in ("gate", "up"):
                shape = (config["moe_intermediate_size"], width)
                yield layer, f"{name}.mlp.experts.{expert}.{part}_proj.weight", shape
            shape = (width, config["moe_intermediate_size"])
            yield layer, f"{name}.mlp.experts.{expert}.down_proj.weight", shape


def write_checkpoint(shape: str, folder: Path, tokenizer: Path, device: str) -> int:
    """Write files of some layers each, several at once; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((SHAPES / shape / "config.json").read_text())
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for number, name, size in tensor_shapes(config):
        files.setdefault(f"model-{number // 4:05}.safetensors", []).append((name, size))
    longest = max(sum(prod(size) for _, size in tensors) for tensors in files.values())
    drawn = torch.empty(longest, dtype=torch.bfloat16, device=device).normal_(0, STANDARD_DEVIATION).cpu()
    numbers = memoryview(drawn.view(torch.uint8).numpy().data)
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda file: _write_file(folder / file[0], file[1], numbers), files.items()))
    index = {"weight_map": {name: file for file, tensors in files.items() for name, _ in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    for file in TOKENIZER_FILES:
        if (tokenizer / file).exists():
            shutil.copy(tokenizer / file, folder / file)
    return sum(written)


def _write_file(path: Path, tensors: list[tuple[str, tuple[int, ...]]], numbers: memoryview) -> int:
    """One safetensors file: its header, then the numbers of all tensors; norms are 1."""
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors:
        start, end = end, end + 2 * prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(numbers[:end])
        for name, size in tensors:
            if "norm" in name:
                file.seek(8 + len(text) + header[name]["data_offsets"][0])
                file.write(ONE * prod(size))
    return end


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="folder of benchmarks/shapes, of family qwen3_moe")
    parser.add_argument("--tokenizer", type=Path, default=Path("examples/demo-moe"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args()
    written = write_checkpoint(flags.shape, flags.folder, flags.tokenizer, flags.device)
    print(f"{written / 1e9:.1f} GB in {flags.folder}")


if __name__ == "__main__":
    main()
