"""The main job from end to end on the bundled model: trace, solve, compare, serve, and a streamed completion.

Run by `make demo`. Every step is a command that is printed before it runs, to be repeated by hand.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[1]
MODEL = Path("examples/demo-moe")
PROMPTS = Path("examples/prompts")
OUTPUT = Path(".demo")
CLUSTER = "cpu2"
START_TIMEOUT_S = 120


def main() -> None:
    """Run all steps; ends with what was made and what to do next."""
    os.chdir(ROOT)
    OUTPUT.mkdir(exist_ok=True)
    started = time.monotonic()
    gpus = count_gpus()
    cluster = "h200x2" if gpus >= 2 else CLUSTER
    print(f"The bundled model: {MODEL}, 8 layers of 16 experts, top-2. GPUs found: {gpus}.")

    heading("1. Trace: run prompts and record every token's experts")
    prompts = join_prompts()
    trace = ["model=" + str(MODEL), f"prompts={prompts}", "max_new_tokens=32", "batch_size=32"]
    trace += [] if gpus else ["dtype=float32"]
    run("profiler", "trace", *trace, "-o", str(OUTPUT / "trace.safetensors"))

    heading("2. Solve: put the experts of each layer where their successors are, on the prompts to solve on")
    flags = ["--trace", str(OUTPUT / "trace.safetensors")]
    settings = [f"cluster={cluster}", "workload.exchange=alltoall"]
    run(
        "placement",
        "solve",
        *flags,
        "-o",
        str(OUTPUT / "plan.json"),
        *settings,
        "objective=locality",
        "objective.max_load=1.15",
    )

    heading("3. Compare: all placements on the prompts to judge on, which the solver did not see")
    outputs = ["-o", str(OUTPUT / "compare.json"), "--plot", str(OUTPUT / "compare.png")]
    brief = ["held_out=[sequences]", "solver.time_limit_s=8"]  # the defaults hold out domains, too, and search longer
    run("placement", "compare", *flags, "--plan", str(OUTPUT / "plan.json"), *outputs, *settings, *brief)

    heading("4. Serve: two ranks, each with the experts of its slots")
    with server(OUTPUT / "plan.json") as url:
        heading("5. Ask, as any OpenAI client does")
        stream_completion(url)
    print(f"\nThe server and its ranks have stopped. All of it took {time.monotonic() - started:.0f} s.")
    print_next_steps()


def count_gpus() -> int:
    """NVIDIA GPUs that PyTorch can use."""
    import torch

    return torch.cuda.device_count()


def join_prompts() -> Path:
    """Interleave the prompts to solve on and to judge on, so that they become even and odd sequences of one trace."""
    solve = (PROMPTS / "solve.jsonl").read_text(encoding="utf-8").splitlines()
    judge = (PROMPTS / "judge.jsonl").read_text(encoding="utf-8").splitlines()
    path = OUTPUT / "prompts.jsonl"
    lines = [line for pair in zip(solve, judge, strict=True) for line in pair]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def heading(text: str) -> None:
    """A step's title."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n## {text}", flush=True)


def show(arguments: list[str]) -> None:
    """The command as a user would type it."""
    print("$ python -m " + " ".join(arguments), flush=True)


def run(*arguments: str) -> None:
    """One command of the project, in a process of its own."""
    show(list(arguments))
    answer = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if answer.returncode:
        sys.exit(answer.returncode)


@contextmanager
def server(plan: Path) -> Iterator[str]:
    """Start the server on a free port, give its URL, and stop it cleanly in the end."""
    arguments = ["runtime", "serve", "--plan", str(plan), "port=0"]
    show(arguments)
    process = subprocess.Popen([sys.executable, "-m", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        yield wait_for_url(process)
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=60):
            sys.exit(f"the server ended with exit code {process.returncode}")
    finally:
        if process.poll() is None:
            process.kill()


def wait_for_url(process: subprocess.Popen[str]) -> str:
    """Pass the server's log on until it says where it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        print(line, end="", flush=True)
        found = re.search(r"serving .* on (http://\S+)", line)
        if found:
            return found[1]
    sys.exit(f"the server ended with exit code {process.wait()} before it was ready")


def stream_completion(url: str) -> None:
    """A completion, printed as it arrives."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    prompt = "func (s *Server) Close() error {\n"
    print(f"POST {url}/v1/completions  model={model}\n\n{prompt}", end="", flush=True)
    begun = time.monotonic()
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=96,
        temperature=0.6,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].text, end="", flush=True)
        if chunk.usage is not None:
            tokens, seconds = chunk.usage.completion_tokens, time.monotonic() - begun
            print(f"\n\n{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s, streamed)")


def print_next_steps() -> None:
    """Where everything is, and what to run next."""
    predicted = json.loads((OUTPUT / "plan.json").read_text(encoding="utf-8"))["predicted"]
    local = {name: by_batch["1"] for name, by_batch in predicted["pair_locality"].items()}
    print(
        f"""
On prompts it was not solved on, the plan keeps {local["plan"]:.1%} of the transitions between layers on one rank;
the contiguous placement keeps {local["contiguous"]:.1%}, EPLB {local["eplb"]:.1%}.

Made:
  {OUTPUT}/trace.safetensors   every token's experts      python -m profiler info {OUTPUT}/trace.safetensors
  {OUTPUT}/plan.json           where each expert goes     python -m placement evaluate --help
  {OUTPUT}/compare.json, .png  all placements compared
Next (inside the environment: source .venv/bin/activate):
  python -m runtime serve --plan {OUTPUT}/plan.json port=8000
  python -m runtime generate --plan {OUTPUT}/plan.json --prompt "In the beginning"
  python -m profiler trace model=YOUR_MODEL prompts=YOUR_PROMPTS.jsonl -o trace.safetensors"""
    )


if __name__ == "__main__":
    main()
