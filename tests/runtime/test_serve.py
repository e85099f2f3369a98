"""`python -m runtime serve` in real processes: answers through OpenAI's client, clean stops, and ranks that die."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.plans import make_plan
from tests.support.serve_process import END_S, START_UP_S, ServeProcess
from tests.support.tiny_models import MAX_POSITIONS, tiny_model
from tests.support.tiny_tokenizer import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
PROMPTS = ["The expert", "a", "In the beginning there was", "9 + 4 =", "print(x)"]
NEW_TOKENS = 24

Start = Callable[..., "ServeProcess"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer and plans beside it."""
    folder = tmp_path_factory.mktemp("serve")
    tiny_model("qwen3_moe").save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    for exchange in ("allreduce", "alltoall"):
        make_plan(str(folder / "model"), "replicated", 2, exchange).save(folder / f"{exchange}.json")
    return folder


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Start]:
    servers: list[ServeProcess] = []

    def run(plan: str, *settings: str, python: tuple[str, ...] = ("-m", "runtime")) -> ServeProcess:
        log = tmp_path / f"{len(servers)}.log"
        arguments = ("serve", "--plan", str(folder / f"{plan}.json"), "device=cpu", *(settings or ("port=0",)))
        servers.append(ServeProcess(log, *arguments, python=python))
        return servers[-1]

    yield run
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str], str]:
    """What Transformers writes after a prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")

    def generate(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return generate


def complete(client: openai.OpenAI, prompt: str) -> str:
    stream = client.completions.create(model="model", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True)
    return "".join(chunk.choices[0].text for chunk in stream)


def test_answers_equal_transformers_and_sigterm_stops(start: Start, expected: Callable[[str], str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start("allreduce", f"port={port}")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    client = server.client()
    assert httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "ok"}
    assert [model.id for model in client.models.list()] == ["model"]

    check_together(client, expected)
    check_chat(client, expected)
    check_seed_and_usage(client)
    check_sampling(client)
    check_refusals(client)

    assert len(server.members()) == 2
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(END_S) == 0, server.log
    server.wait_gone(1)
    assert not server.error_lines(), server.log
    assert "terminate" not in server.log
    assert "Traceback" not in server.log


def check_together(client: openai.OpenAI, expected: Callable[[str], str]) -> None:
    """Requests that come one after the other while the first still run."""

    def later(number: int) -> str:
        time.sleep(0.03 * number)
        return complete(client, PROMPTS[number])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(later, range(len(PROMPTS))))
    assert texts == [expected(prompt) for prompt in PROMPTS]


def check_chat(client: openai.OpenAI, expected: Callable[[str], str]) -> None:
    stream = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": "Who routes?"}],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == expected("user: Who routes?\nassistant: ")


def check_seed_and_usage(client: openai.OpenAI) -> None:
    def sample(seed: int) -> openai.types.Completion:
        extra = {"ignore_eos": True}
        return client.completions.create(model="model", prompt="abc", max_tokens=12, seed=seed, extra_body=extra)

    first, second, other = sample(5), sample(5), sample(6)
    assert first.choices[0].text == second.choices[0].text != other.choices[0].text
    assert first.choices[0].finish_reason == "length"
    assert first.usage is not None
    assert (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.total_tokens) == (3, 12, 15)


def check_sampling(client: openai.OpenAI) -> None:
    """Same seed, same text, alone or among others; a bias decides; log-probabilities are the model's own."""

    def sample(seed: int) -> list[tuple[str, list[float]]]:
        answer = client.completions.create(
            model="model",
            prompt="abc",
            max_tokens=12,
            seed=seed,
            n=2,
            logprobs=2,
            presence_penalty=0.5,
            extra_body={"ignore_eos": True, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2},
        )
        return [(choice.text, (choice.logprobs and choice.logprobs.token_logprobs) or []) for choice in answer.choices]

    alone = sample(5)
    assert alone[0][0] != alone[1][0]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(sample, (7, 5, 9, 4)))
    for (text, logprobs), (same_text, same_logprobs) in zip(alone, together[1], strict=True):
        assert text == same_text
        assert logprobs == pytest.approx(same_logprobs, abs=1e-4)
    assert together[3][1][0] == alone[0][0], "the second choice has the next seed"

    biased: Any = {"prompt": "abc", "max_tokens": 3, "temperature": 0, "logprobs": 20}
    plain = client.completions.create(model="model", **biased).choices[0].logprobs
    forced = client.completions.create(model="model", logit_bias={"5": 100}, **biased).choices[0].logprobs
    assert plain is not None
    assert forced is not None
    assert len(set(forced.tokens or [])) == 1
    # Before anything differs but the bias, the model's own distribution is the same.
    assert (plain.top_logprobs or [])[0].items() <= (forced.top_logprobs or [])[0].items()
    first = (forced.token_logprobs or [0.0])[0]
    assert first < max(plain.token_logprobs or [0.0]), "the bias is not in the log-probabilities"


def check_refusals(client: openai.OpenAI) -> None:
    """Requests that would break a step are refused, and the server goes on."""
    for settings, reason in (
        ({"prompt": "x" * MAX_POSITIONS}, f"context {MAX_POSITIONS}"),
        ({"prompt": "x", "max_tokens": MAX_POSITIONS}, f"context is {MAX_POSITIONS}"),
        ({"prompt": [1, 2, 100000]}, "100000"),
        ({"prompt": "x", "seed": 2**64}, "seed"),
        ({"prompt": "x", "top_p": 0.0}, "top_p"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.completions.create(model="model", **settings)
    answer = client.completions.create(model="model", prompt="x", temperature=1e-300, top_p=1e-300, max_tokens=2)
    assert answer.choices


def test_a_killed_rank_ends_the_stream_and_the_server(start: Start) -> None:
    server = start("allreduce")
    client = server.client()
    with pytest.raises(openai.APIError, match="rank 1 was killed by SIGKILL"):
        stream_until(client, lambda: os.kill(server.pid_of(1), signal.SIGKILL))
    assert server.process.wait(END_S) == 1
    server.wait_gone(1)
    assert len(server.error_lines()) == 1, server.log
    assert "rank 1 was killed by SIGKILL" in server.error_lines()[0]
    assert "Traceback" not in server.log


def stream_until(client: openai.OpenAI, act: Callable[[], None]) -> None:
    """Read a long stream, and after its first piece do something to the server."""
    extra = {"ignore_eos": True}
    acted = False
    for _ in client.completions.create(model="model", prompt="x", max_tokens=200, stream=True, extra_body=extra):
        if not acted:
            act()
            acted = True


def test_a_stopped_rank_is_lost_after_its_timeout(start: Start) -> None:
    server = start("alltoall", "port=0", "rank_timeout_s=2")
    client = server.client()
    time.sleep(4)  # idle ranks do not run into the timeout
    assert client.completions.create(model="model", prompt="x", max_tokens=2).choices
    with pytest.raises(openai.APIError, match="Timed out"):
        stream_until(client, lambda: os.kill(server.pid_of(1), signal.SIGSTOP))
    assert server.process.wait(END_S) == 1
    server.wait_gone(1)
    assert len(server.error_lines()) == 1, server.log
    assert server.error_lines()[0].endswith("; rank 1 does not answer")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("ready", [True, False], ids=["serving", "starting"])
def test_the_other_ranks_end_when_rank_0_is_killed(start: Start, ready: bool) -> None:
    server = start("allreduce")
    if ready:
        server.wait_ready()
    deadline = time.monotonic() + START_UP_S
    while len(server.members()) < 2:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)
    server.process.send_signal(signal.SIGKILL if ready else signal.SIGTERM)
    server.process.wait()
    server.wait_gone()
    assert len(server.error_lines()) <= 1, server.log
    assert "Traceback" not in server.log


def test_started_by_torchrun(start: Start, expected: Callable[[str], str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "runtime")
    server = start("alltoall", python=torchrun)
    client = server.client()
    errors: list[str] = []

    def check(prompt: str) -> None:
        if complete(client, prompt) != expected(prompt):
            errors.append(prompt)

    threads = [threading.Thread(target=check, args=(prompt,)) for prompt in PROMPTS[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(2 * END_S)
    server.wait_gone(1)
