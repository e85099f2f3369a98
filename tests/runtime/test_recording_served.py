"""`serve record=…` in real processes: what is on disk while requests come, are cancelled, and the server stops."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from tests.support.plans import make_plan
from tests.support.recorded import check_recorded
from tests.support.serve_process import END_S, PROJECT, ServeProcess
from tests.support.tiny_models import MAX_POSITIONS, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9, 40, 41], [100, 11, 12], [77], [64, 3, 99, 98]]
CANCELLED, INTERRUPTED = [90, 91, 92, 93], [80, 81, 82]
NEW_TOKENS = 8
FINISH_S = 30


def complete(client: openai.OpenAI, prompt: list[int]) -> None:
    settings: Any = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
    client.completions.create(model="model", **settings)


def begin_long(client: openai.OpenAI, prompt: list[int]) -> Any:
    """A stream of which the first pieces have come."""
    settings: Any = {"prompt": prompt, "max_tokens": MAX_POSITIONS - 8, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model="model", stream=True, **settings)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    return stream


def wait_for(condition: Callable[[], bool], server: ServeProcess) -> None:
    deadline = time.monotonic() + FINISH_S
    while not condition():
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def test_recording_real_requests(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("qwen3_moe").save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    make_plan(str(model), "replicated", 2, "alltoall").save(tmp_path / "plan.json")
    traces = tmp_path / "traces"
    traces.mkdir()
    settings = ("record_rate=1", "record_token_ids=true", "record_minutes=0.02", "port=0", "device=cpu")
    command = ("serve", "--plan", str(tmp_path / "plan.json"), f"record={traces}/routes", *settings)
    server = ServeProcess(tmp_path / "log", *command)
    try:
        client = server.client()
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            list(pool.map(lambda prompt: complete(client, prompt), PROMPTS))
        wait_for(lambda: (traces / "routes-0001.safetensors").exists(), server)
        begin_long(client, CANCELLED).close()
        stream = begin_long(client, INTERRUPTED)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2 * END_S) == 0, server.log
        stream.close()
    finally:
        server.kill()
    paths = sorted(traces.glob("routes-*.safetensors"))
    others = check_recorded(paths, str(model), PROMPTS, NEW_TOKENS)
    assert sorted(other.token_ids[: len(CANCELLED)].tolist()[:3] for other in others) == [INTERRUPTED, CANCELLED[:3]]
    assert all(4 < len(other.token_ids) < MAX_POSITIONS for other in others)
    assert not [path for path in traces.iterdir() if path.suffix == ".parts"]
    solve = ("solve", "--trace", str(paths[0]), "-o", str(tmp_path / "new.json"), "cluster=cpu2", "strategy=eplb")
    subprocess.run([sys.executable, "-m", "placement", *solve], cwd=PROJECT, check=True, timeout=120)
    assert (tmp_path / "new.json").exists()
