"""Time per decode step of Transformers' own model of a published shape, with random weights, in several settings.

    python -m benchmarks.transformers_decode -o benchmarks/results/transformers_decode.json

``eager`` settings run the whole model with a dynamic cache, as ``generate`` does; ``batched_mm`` is what ``generate``
switches decode steps to. ``compiled`` settings have a static cache and ``torch.compile`` with CUDA graphs. Compiling
all layers takes minutes for every batch size, so two models of a few layers are compiled, and their step times carried
on along a straight line: such a row says so, and gives the two times it comes from.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording_cost import random_model
from placement import provenance
from placement.atomic import write_atomically

SHAPE = Path(__file__).parent / "shapes" / "qwen3-30b-a3b"
DEPTHS = (2, 6)  # layers of the models that are compiled


class Steps:
    """Decode steps of one batch.

    Args:
        model: the model.
        cache: empty.
        batch: sequences.
        context: tokens of every sequence before the first step.
        compiled: whether the step runs compiled.
    """

    def __init__(self, model: Any, cache: Any, batch: int, context: int, compiled: bool) -> None:
        self.cache = cache
        self._forward: Callable[..., Any] = model.forward
        prompt = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
        model.forward(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=model.device)
        self.position = torch.full((batch, 1), context, dtype=torch.int64, device=model.device)
        if compiled:
            torch._dynamo.reset()
            self._forward = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)

    def __call__(self) -> torch.Tensor:
        """One step; the greedy tokens ``[B, 1]``, which the next step is fed."""
        out = self._forward(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        )
        self.token = out.logits[:, -1:].argmax(-1).clone()
        self.position = self.position + 1
        return self.token


@torch.inference_mode()
def time_steps(steps: Steps, warmup: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, and seconds that the first ones took; the tokens go to the host after each."""
    start_s = time.perf_counter()
    for _ in range(warmup):
        steps().tolist()
    warm_s = time.perf_counter() - start_s
    times = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        steps().tolist()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times), warm_s


def eager_rows(model: Any, batches: list[int], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """The whole model, layer by layer."""
    from transformers import DynamicCache

    rows = []
    for experts, batch in itertools.product(("batched_mm", "grouped_mm"), batches):
        model.set_experts_implementation("grouped_mm")  # prefill would copy every token's experts otherwise
        try:
            with torch.inference_mode():
                steps = Steps(model, DynamicCache(config=model.config), batch, flags.context, compiled=False)
            model.set_experts_implementation(experts)
            step_s, _ = time_steps(steps, 3, flags.steps)
        except torch.OutOfMemoryError:
            print(f"eager {experts} batch {batch}: out of memory", flush=True)
            continue
        rows.append(describe(flags, f"eager, dynamic cache, {experts}", batch) | {"ms_per_step": step_s * 1e3})
        print(f"eager {experts} batch {batch}: {step_s * 1e3:.1f} ms", flush=True)
    return rows


def compiled_rows(batches: list[int], flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Two shallow models, compiled; the time of all layers from theirs."""
    from transformers import AutoConfig, StaticCache

    layers = AutoConfig.from_pretrained(flags.shape).num_hidden_layers
    models = [random_model(Path(flags.shape), torch.bfloat16, torch.device(flags.device), depth) for depth in DEPTHS]
    rows = []
    start_s = time.perf_counter()
    for batch in batches:
        for experts in ("grouped_mm", "batched_mm") if batch <= 8 else ("grouped_mm",):
            if time.perf_counter() - start_s > flags.compile_limit_s:
                print(f"compiled {experts} batch {batch}: left out, the time is over", flush=True)
                continue
            found = []
            for model in models:
                model.set_experts_implementation("grouped_mm")
                cache = StaticCache(config=model.config, max_cache_len=flags.context + flags.steps + 16)
                with torch.inference_mode():
                    steps = Steps(model, cache, batch, flags.context, compiled=flags.device != "cpu")
                    model.set_experts_implementation(experts)
                found.append(time_steps(steps, 5, flags.steps))
            (short_s, _), (long_s, warm_s) = found
            step_s = short_s + (layers - DEPTHS[0]) * (long_s - short_s) / (DEPTHS[1] - DEPTHS[0])
            row = describe(flags, f"compiled, static cache, {experts}", batch) | {"ms_per_step": step_s * 1e3}
            row |= {
                f"ms_per_step_of_{DEPTHS[0]}_layers": short_s * 1e3,
                f"ms_per_step_of_{DEPTHS[1]}_layers": long_s * 1e3,
            }
            rows.append(row | {"extrapolated_to_layers": layers, "compile_s_of_the_longer": warm_s})
            print(f"compiled {experts} batch {batch}: {step_s * 1e3:.2f} ms for {layers} layers", flush=True)
    return rows


def describe(flags: argparse.Namespace, setting: str, batch: int) -> dict[str, Any]:
    """What every row says of its run."""
    return {
        "engine": "transformers",
        "setting": setting,
        "shape": Path(flags.shape).name,
        "gpus": 1 if flags.device.startswith("cuda") else 0,
        "batch": batch,
        "context": f"{flags.context}-{flags.context + flags.steps}",
        "dtype": "bfloat16",
        "weights": "random",
        "routes": "model",
        "repeats": flags.steps,
    }


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--shape", default=str(SHAPE), help="folder with a config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=136)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--compile-limit-s", type=float, default=120.0, help="begin no further compilation after it")
    parser.add_argument("--commit", help="of a copy without git history")
    return parser.parse_args()


def main() -> None:
    """Time all settings and write the rows."""
    flags = parse_flags()
    batches = [int(size) for size in flags.batches.split(",")]
    device = torch.device(flags.device)
    document = provenance.describe_run(("torch", "transformers", "triton"))
    document["commit"] = flags.commit or document["commit"]
    if device.type == "cuda":
        document["device"] = f"1x {torch.cuda.get_device_name(device)}"
    rows = compiled_rows(batches, flags)
    gc.collect()
    rows += eager_rows(random_model(Path(flags.shape), torch.bfloat16, device), batches, flags)
    write_atomically(Path(flags.output), json.dumps(document | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
