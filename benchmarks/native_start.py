"""Seconds from starting `python -m runtime serve` to the first token over HTTP, of a checkpoint in the page cache.

    python -m benchmarks.random_checkpoint /dev/shm/qwen3-30b-a3b
    python -m benchmarks.native_start --model /dev/shm/qwen3-30b-a3b -o benchmarks/results/native_start.json

Files that have just been written are in the page cache. Every start is a process of its own; the first one compiles
all kernels into an empty cache of Triton's (``compiled: false``), the next ones find them there. The server says in its
log what its parts took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.expert_parallel_decode import make_plan
from placement import provenance
from placement.atomic import write_atomically

PARTS = re.compile(r"weights in ([\d.]+) s, graphs in ([\d.]+) s")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def first_token(url: str, process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Ask for one token until the server answers.

    Raises:
        RuntimeError: the server ended, or did not answer in time.
    """
    body = json.dumps({"model": "shape", "prompt": [5, 6, 7, 8], "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    end_s = time.perf_counter() + limit_s
    while time.perf_counter() < end_s:
        try:
            with urllib.request.urlopen(request, timeout=limit_s) as answer:
                assert json.loads(answer.read())["usage"]["completion_tokens"] == 1
                return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                break
            time.sleep(0.05)
    raise RuntimeError(f"no token within {limit_s} s; the server's exit code is {process.poll()}")


def start_once(plan: Path, flags: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Start the server, wait for its first token, and end it."""
    port = free_port()
    command = [sys.executable, "-m", "runtime", "serve", "--plan", str(plan), f"port={port}", "served_model_name=shape"]
    command += [f"device={flags.device}", "path=native", f"max_sequences={flags.max_sequences}"]
    log = cache.parent / "log"
    with log.open("wb") as file:
        start_s = time.perf_counter()
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            first_token(f"http://127.0.0.1:{port}", process, flags.limit_s)
            total_s = time.perf_counter() - start_s
        except RuntimeError as error:
            raise SystemExit(f"{error}\n{log.read_text()}") from error
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    found = PARTS.search(log.read_text())
    assert found is not None, log.read_text()
    return {"s_to_first_token": total_s, "s_weights": float(found[1]), "s_graphs": float(found[2])}


def main() -> None:
    """Start the server several times and write a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", required=True, help="JSON file of the rows")
    parser.add_argument("--model", required=True, help="folder from benchmarks.random_checkpoint")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--max-sequences", type=int, default=64, help="graphs for up to so many sequences are captured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--commit", help="of a copy without git history")
    flags = parser.parse_args()
    config = json.loads((Path(flags.model) / "config.json").read_text())
    shape = (config["num_experts"], config["num_experts_per_tok"], list(range(config["num_hidden_layers"])), 1)
    files = list(Path(flags.model).glob("*.safetensors"))
    document = provenance.describe_run(("torch", "transformers", "triton"))
    document["commit"] = flags.commit or document["commit"]
    if flags.device == "cuda":
        found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True)
        document["device"] = f"1x {found.stdout.decode().splitlines()[0]}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        contents = make_plan("contiguous", *shape)
        contents.save(plan)
        text = json.loads(plan.read_text()) | {"model": flags.model, "model_fingerprint": None}
        plan.write_text(json.dumps(text))
        for number in range(flags.starts):
            row: dict[str, Any] = {"engine": "expertplan native", "shape": Path(flags.model).name, "gpus": 1}
            row |= {"dtype": config["dtype"], "gb_of_files": sum(file.stat().st_size for file in files) / 1e9}
            row |= {"start": number + 1, "compiled": number > 0, "max_sequences": flags.max_sequences, "repeats": 1}
            row |= start_once(plan, flags, Path(folder) / "triton")
            rows.append(row)
            print({key: round(value, 2) for key, value in row.items() if isinstance(value, float)}, flush=True)
    write_atomically(Path(flags.output), json.dumps(document | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
