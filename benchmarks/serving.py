"""What serving costs beside the decode step itself: the real server under load, on a shape with random weights.

    python -m benchmarks.serving --shape qwen3-30b-a3b -o benchmarks/results/serving_one_gpu.json

One process loads the shape, times bare decode steps at the batch that the load keeps running and at the same contexts,
and then serves: the HTTP server, the engine and a made-up tokenizer of the shape's vocabulary (texts are decoded as
usual, prompts are token ids). `bench serve` loads it from a process of its own, with as many requests open as the batch
has places. The overhead of serving is the median step of the full batch that feeds no prompt, less the bare step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.expert_parallel_decode import make_plan
from placement.atomic import write_atomically
from placement.plan import PlacementPlan
from runtime.bench import DecodeBenchmark, describe_machine, time_batch
from runtime.engine import Engine
from runtime.native.families import read_shape
from runtime.native.loading import load_config
from runtime.recording_settings import RecordSettings
from runtime.requests import StepTime
from runtime.serve import serve
from runtime.server_settings import ServerSettings
from runtime.settings import EngineSettings
from runtime.start import Run, start_run

SHAPES = Path(__file__).parent / "shapes"
WARMUP_STEPS = 8
POLL_S = 0.2  # the engine remembers the last 64 steps: more than it takes in this time
LIMIT_S = 400


def make_model(shape: Path, folder: Path) -> int:
    """A folder with the shape's configuration and a tokenizer with a word per token id; the vocabulary's size."""
    config = json.loads((shape / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    size = int(config["vocab_size"])
    tokenizer = Tokenizer(WordLevel({f" w{number}": number for number in range(size)}, unk_token=" w0"))
    tokenizer.decoder = Fuse()
    tokenizer.add_tokens(["text"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return size


def plan_for(folder: Path) -> PlacementPlan:
    """All experts on one rank."""
    shape = read_shape(load_config(str(folder)))
    layers = [layer for layer, routed in enumerate(shape.moe_layers) if routed]
    return make_plan("contiguous", shape.num_experts, shape.top_k, layers, 1)


@dataclass
class Load:
    """The client's process, and the engine's steps meanwhile.

    Args:
        url: of the server.
        flags: of the command line.
        vocabulary: of the model.
        output: file of the client's row.
    """

    url: str
    flags: argparse.Namespace
    vocabulary: int
    output: Path
    engine: Engine | None = None
    steps: list[StepTime] = field(default_factory=list)
    failure: str = ""

    def run(self) -> None:
        """Wait for the server, load it, and end it by a signal to this process."""
        try:
            self._wait_ready()
            self._watch(subprocess.Popen(self._command(), stdout=sys.stderr))
        except (OSError, TimeoutError, RuntimeError) as error:
            self.failure = f"{type(error).__name__}: {error}"
        os.kill(os.getpid(), signal.SIGTERM)

    def _command(self) -> list[str]:
        flags = self.flags
        command = [sys.executable, "-m", "runtime", "bench", "serve", "--url", self.url, "-o", str(self.output)]
        command += ["--num-prompts", str(flags.num_prompts), "--concurrency", str(flags.batch)]
        command += ["--input-len", str(flags.input_len), "--output-len", str(flags.output_len)]
        return [*command, "--vocab-size", str(self.vocabulary), "--warmup", "2", "--engine", "expertplan native"]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise TimeoutError("the server did not become ready")

    def _watch(self, client: subprocess.Popen[bytes]) -> None:
        """Collect the times of all steps until the client ends."""
        assert self.engine is not None
        seen = self.engine.status().decode_steps
        deadline = time.monotonic() + LIMIT_S
        while True:
            ended = client.poll()
            status = self.engine.status()
            new = min(status.decode_steps - seen, len(status.step_times))
            self.steps += status.step_times[len(status.step_times) - new :]
            seen = status.decode_steps
            if ended is not None:
                break
            if time.monotonic() > deadline:
                client.kill()
                raise TimeoutError("the client did not end")
            time.sleep(POLL_S)
        if ended != 0:
            raise RuntimeError(f"the client ended with {ended}")


def serve_and_load(folder: Path, flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Run everything; the machine, the row of the bare steps and the client's row with the server's steps."""
    vocabulary = make_model(SHAPES / flags.shape if (SHAPES / flags.shape).is_dir() else Path(flags.shape), folder)
    plan_for(folder).save(folder / "plan.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    load = Load(f"http://127.0.0.1:{port}", flags, vocabulary, folder / "client.json")
    tokens = flags.input_len + flags.output_len
    benchmark = DecodeBenchmark((flags.batch,), flags.input_len, flags.output_len, WARMUP_STEPS, 0)
    found: dict[str, Any] = {}

    def start_and_time(plan: PlacementPlan, model: str, settings: EngineSettings) -> Run:
        run = start_run(plan, model, settings)
        found["machine"], found["bare"] = describe_machine(run.group), time_batch(run, benchmark, flags.batch)
        return run

    original = Run.start_engine

    def start_engine(run: Run, settings: EngineSettings) -> Engine:
        load.engine = original(run, settings)
        return load.engine

    settings = EngineSettings(
        model=str(folder),
        weights="random",
        path="native",
        device=flags.device,
        max_sequences=flags.batch,
        cache_tokens=2 * flags.batch * (tokens + WARMUP_STEPS + 64),
    )
    threading.Thread(target=load.run, daemon=True).start()
    with (
        mock.patch("runtime.serve.start_run", start_and_time),
        mock.patch.object(Run, "start_engine", start_engine),
    ):
        code = serve(str(folder / "plan.json"), settings, ServerSettings(port=port), RecordSettings())
    if code or load.failure:
        raise SystemExit(f"error: {load.failure or f'the server ended with {code}'}")
    [row] = json.loads(load.output.read_text())["rows"]
    return found["machine"], found["bare"], row | judge_steps(load.steps, found["bare"]["ms_per_step"], flags.batch)


def judge_steps(steps: list[StepTime], bare_ms: float, batch: int) -> dict[str, Any]:
    """What the server's steps of the full batch took, beside the bare step; the share of steps that they were."""
    full = sorted(step.seconds * 1e3 for step in steps if step.batch == batch)
    pure = sorted(step.seconds * 1e3 for step in steps if step.batch == batch and not step.prompt_tokens)
    if not pure:
        raise SystemExit(f"error: no step decoded {batch} sequences alone; send more requests")
    median = statistics.median(pure)
    return {
        "server_ms_per_step": median,
        "server_p95_ms_per_step": pure[int(0.95 * (len(pure) - 1))],
        "server_steps": len(pure),
        "server_steps_with_prompts": len(full) - len(pure),
        "share_of_steps_at_batch": len(full) / len(steps),
        "bare_ms_per_step": bare_ms,
        "overhead": median / bare_ms - 1,
    }


def parse_flags() -> argparse.Namespace:
    """Flags of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="folder of benchmarks/shapes, or a path")
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64, help="requests open at once")
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--commit", help="of a copy without git history")
    return parser.parse_args()


def main() -> None:
    """Measure, print the rows and write them."""
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as folder:
        machine, bare, served = serve_and_load(Path(folder), flags)
    shape = Path(flags.shape).name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and flags.device == "cuda" else "CPU"
    described = {"shape": shape, "device": device, "weights": "random", "dtype": bare["dtype"], "gpus": bare["gpus"]}
    bare = {"kind": "bare decode"} | bare | described
    served = {"kind": "served", "batch": flags.batch, "context": bare["context"]} | served | described
    machine["commit"] = flags.commit or machine["commit"]
    write_atomically(Path(flags.output), json.dumps(machine | {"rows": [bare, served]}, indent=1) + "\n")
    print(json.dumps([bare, served], indent=1))


if __name__ == "__main__":
    main()
