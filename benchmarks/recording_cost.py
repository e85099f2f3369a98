"""How much does recording slow down Transformers' own ``generate``, on a large shape with random weights?

    python -m benchmarks.recording_cost -o benchmarks/results/profiler_recording.json

Three ways to run the same batch take turns: ``generate`` alone (``none``), recorded as ``python -m profiler trace``
records it, the writing of the trace included (``routes``), and that with ``gate_ahead=true`` (``routes+gate_ahead``).
All three generate with the recorder's settings: greedy, with a dynamic cache, eagerly: decode steps do not run under
CUDA graphs. With ``default`` experts Transformers computes decode steps as it chooses itself (on GPUs by copying every
token's experts); ``grouped_mm`` keeps the grouped matrix products of prefill.

A slowdown is the ratio of a recorded run to the unrecorded run of its own round, less one; the median over rounds is
reported, with the extremes. ``same_tokens_fraction`` is the share of tokens equal to those of the first unrecorded
run: bf16 generation on a GPU does not repeat itself exactly, so the row of unrecorded runs tells what to expect.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from placement import provenance
from placement.atomic import write_atomically
from profiler.recorder import generate_batch, record_routes
from profiler.seam import find_moe_layers
from profiler.trace_writer import TraceWriter

SHAPE = Path(__file__).parent / "shapes" / "qwen3-30b-a3b"
RECORDINGS = ("none", "routes", "routes+gate_ahead")
EXPERTS = ("default", "grouped_mm")
STANDARD_DEVIATION = 0.02


def random_model(shape: Path, dtype: torch.dtype, device: torch.device, num_layers: int | None = None) -> Any:
    """A model of that configuration (or its first layers alone), its weights drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shape)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    torch.manual_seed(0)
    model.init_weights()  # buffers, norms and biases as the family has them
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, STANDARD_DEVIATION)
    model.generation_config.eos_token_id = None  # every run generates as many tokens
    return model.eval().requires_grad_(False)


class Runs:
    """One batch of random prompts, run with and without recording.

    Args:
        model: the model.
        flags: of the command line.
    """

    def __init__(self, model: Any, flags: argparse.Namespace) -> None:
        self.model, self.flags = model, flags
        self.layers = find_moe_layers(model)
        generator = np.random.default_rng(0)
        shape = (flags.batch, flags.prompt_tokens)
        self.prompts: list[list[int]] = generator.integers(model.config.vocab_size, size=shape).tolist()

    def run(self, recording: str) -> np.ndarray:
        """Run the batch; returns the tokens that were fed, ``[B, S]``."""
        if recording == "none":
            return generate_batch(self.model, self.prompts, self.flags.new_tokens)[:, :-1]
        gate_ahead = recording == "routes+gate_ahead"
        routes = record_routes(
            self.model,
            self.prompts,
            batch_size=self.flags.batch,
            max_new_tokens=self.flags.new_tokens,
            gate_ahead=gate_ahead,
        )
        fed = []
        with tempfile.TemporaryDirectory() as folder, self._writer(Path(folder) / "trace", gate_ahead) as writer:
            for record in routes:
                writer.add_sequence(
                    record.experts, decode=record.decode, weights=record.weights, gate_ahead=record.gate_ahead
                )
                fed.append(record.token_ids)
        return np.stack(fed)

    def _writer(self, path: Path, gate_ahead: bool) -> TraceWriter:
        return TraceWriter(
            path,
            model=str(self.flags.shape),
            num_experts=self.layers[0].num_experts,
            layer_ids=[layer.layer_id for layer in self.layers],
            top_k=self.layers[0].top_k,
            weights=True,
            token_ids=False,
            gate_ahead=gate_ahead,
        )


def measure(run: Callable[[str], np.ndarray], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Time all ways to run in turns, after one round that is not counted.

    Args:
        run: runs the batch in one of ``RECORDINGS`` and returns its tokens.
        repeats: counted rounds.
        device: where the model is.

    Returns:
        One row per way: times, slowdown, the share of tokens equal to the first unrecorded run's, memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in RECORDINGS}
    same: dict[str, list[float]] = {name: [] for name in RECORDINGS}
    memory_bytes = dict.fromkeys(RECORDINGS, 0)
    expected = np.empty(0)
    for number in range(repeats + 1):
        # Every way is first, second and last in turn, so that none profits from its place.
        for name in np.roll(RECORDINGS, number).tolist():
            gc.collect()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            tokens = run(name)  # ends with the tokens on the host: nothing of it is still running
            elapsed = time.perf_counter() - start
            if not expected.size:  # the first way of the first round
                expected = tokens
            if number:
                seconds[name].append(elapsed)
                same[name].append(float((tokens == expected).mean()))
                if device.type == "cuda":
                    memory_bytes[name] = max(memory_bytes[name], torch.cuda.max_memory_allocated(device))
    rows = []
    for name in RECORDINGS:
        ratios = [own / alone - 1 for own, alone in zip(seconds[name], seconds["none"], strict=True)]
        row = {
            "recording": name,
            "repeats": repeats,
            "s_per_generate": statistics.median(seconds[name]),
            "min_s_per_generate": min(seconds[name]),
            "max_s_per_generate": max(seconds[name]),
            "slowdown_fraction": statistics.median(ratios),
            "min_slowdown_fraction": min(ratios),
            "max_slowdown_fraction": max(ratios),
            "same_tokens_fraction": min(same[name]),
        }
        if device.type == "cuda":
            row["peak_memory_gb"] = memory_bytes[name] / 1e9
        rows.append(row)
    return rows


def describe(flags: argparse.Namespace, model: Any, experts: str) -> dict[str, Any]:
    """What every row says of its run."""
    return {
        "engine": "transformers generate",
        "shape": Path(flags.shape).name,
        "gpus": 1 if flags.device.startswith("cuda") else 0,
        "batch": flags.batch,
        "context": f"{flags.prompt_tokens}-{flags.prompt_tokens + flags.new_tokens}",
        "prompt_tokens": flags.prompt_tokens,
        "new_tokens": flags.new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": "random",
        "routes": "model",
        "experts": experts,
        "decode_under_cuda_graphs": False,
    }


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shape", default=str(SHAPE), help="folder with a config.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=32, help="prompts run together")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--experts", default=",".join(EXPERTS), help="how decode steps compute experts, comma-separated"
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds per experts implementation")
    parser.add_argument("--commit", help="of a copy without git history")
    flags = parser.parse_args()
    if unknown := set(flags.experts.split(",")) - set(EXPERTS):
        parser.error(f"--experts {', '.join(sorted(unknown))}: expected some of {', '.join(EXPERTS)}")
    return flags


def main() -> None:
    """Measure every experts implementation and write the rows."""
    flags = parse_flags()
    device = torch.device(flags.device)
    document = provenance.describe_run(("torch", "transformers", "triton"))
    document["commit"] = flags.commit or document["commit"]
    if device.type == "cuda":
        document["device"] = f"1x {torch.cuda.get_device_name(device)}"
    model = random_model(Path(flags.shape), getattr(torch, flags.dtype), device)
    runs = Runs(model, flags)
    rows: list[dict[str, Any]] = []
    print(f"{'experts':<12} {'recording':<18} {'s/generate':>10} {'slowdown':>9} {'of one round':>18} {'same':>6}")
    for experts in flags.experts.split(","):
        # What ``generate`` enters around its decode steps, to switch the experts' implementation there.
        kept = mock.patch.object(model, "_optimize_model_for_decode", nullcontext)
        with nullcontext() if experts == "default" else kept:
            figures = measure(runs.run, flags.repeats, device)
        for measured in figures:
            rows.append(row := describe(flags, model, experts) | measured)
            # A step takes the share of one new token; prefill is counted in, as users see it.
            row["ms_per_step"] = row["s_per_generate"] * 1e3 / flags.new_tokens
            spread = f"{row['min_slowdown_fraction']:+.1%} to {row['max_slowdown_fraction']:+.1%}"
            figures_of_row = f"{row['s_per_generate']:>10.3f} {row['slowdown_fraction']:>+9.2%} {spread:>18}"
            print(
                f"{experts:<12} {row['recording']:<18} {figures_of_row} {row['same_tokens_fraction']:>6.3f}", flush=True
            )
        write_atomically(Path(flags.output), json.dumps(document | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
