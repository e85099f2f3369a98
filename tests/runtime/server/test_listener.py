"""The socket and the server's life: a port in use, signals, a failing engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

from profiler.errors import InputError
from runtime.server import bind_socket, create_app, run_server
from runtime.server.listener import socket_url
from tests.runtime.server.scripted_engine import ScriptedEngine

SCRIPT = """
import sys
import threading
from runtime.server import bind_socket, create_app, run_server
from tests.runtime.server.scripted_engine import ScriptedEngine, byte_level_tokenizer

engine = ScriptedEngine([[5, 6, threading.Event()]])
app = create_app(engine, byte_level_tokenizer(), "demo", created=0)
server_socket = bind_socket("127.0.0.1", 0)
failure = run_server(app, server_socket, engine, grace_seconds=0.1, on_ready=lambda url: print(url, flush=True))
print("failure:", failure, "cancelled:", engine.cancelled, flush=True)
"""


def test_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            bind_socket("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "0 to 65535"),
        ("no.such.host.invalid", 8000, "host"),
        ("192.0.2.1", 0, "does not have that"),
    ],
)
def test_addresses_that_do_not_work(host: str, port: int, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        bind_socket(host, port)
    assert "\n" not in str(caught.value)


def test_port_lost_before_the_server_starts(tokenizer: Any) -> None:
    mine = bind_socket("127.0.0.1", 0)
    port = mine.getsockname()[1]
    with bind_socket("127.0.0.1", port) as other:
        other.listen()
        engine = ScriptedEngine()
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: the port is in use"):
            run_server(create_app(engine, tokenizer, "demo", created=0), mine, engine)
    assert mine.fileno() == -1


def test_url() -> None:
    with bind_socket("127.0.0.1", 0) as server_socket:
        assert socket_url(server_socket) == f"http://127.0.0.1:{server_socket.getsockname()[1]}"


def test_failure_of_on_ready_ends_the_server(tokenizer: Any) -> None:
    def on_ready(url: str) -> None:
        raise BrokenPipeError(url)

    engine = ScriptedEngine()
    with pytest.raises(BrokenPipeError):
        run_server(
            create_app(engine, tokenizer, "demo", created=0), bind_socket("127.0.0.1", 0), engine, on_ready=on_ready
        )


def test_failed_engine_ends_the_server(tokenizer: Any) -> None:
    engine = ScriptedEngine([[5, 6, threading.Event()]])
    app = create_app(engine, tokenizer, "demo", created=0)
    urls: list[str] = []
    ready = threading.Event()
    results: list[str | None] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    server_socket = bind_socket("127.0.0.1", 0)
    thread = threading.Thread(
        target=lambda: results.append(run_server(app, server_socket, engine, grace_seconds=1, on_ready=on_ready)),
        daemon=True,
    )
    thread.start()
    assert ready.wait(10)
    assert httpx.get(f"{urls[0]}/health").status_code == 200
    body = {"prompt": "a", "stream": True}
    with httpx.stream("POST", f"{urls[0]}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        # The engine's script waits for ever: it never tells the request.
        engine.failure = "rank 1 ended with code -9"
        assert any("rank 1 ended with code -9" in line for line in lines)
    thread.join(10)
    assert results == ["rank 1 ended with code -9"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{urls[0]}/health")


def test_a_half_sent_request_does_not_hold_up_the_end(tokenizer: Any) -> None:
    engine = ScriptedEngine()
    app = create_app(engine, tokenizer, "demo", created=0)
    server_socket = bind_socket("127.0.0.1", 0)
    address = server_socket.getsockname()
    ready = threading.Event()
    thread = threading.Thread(
        target=run_server,
        args=(app, server_socket, engine),
        kwargs={"grace_seconds": 60, "on_ready": lambda url: ready.set()},
        daemon=True,
    )
    thread.start()
    assert ready.wait(10)
    with socket.create_connection(address, timeout=20) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        deadline = time.monotonic() + 10
        while not app.state.reading:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        engine.failure = "rank 1 ended with code -9"
        assert half.recv(100).startswith(b"HTTP/1.1 408 ")
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_with_a_running_stream(number: signal.Signals) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    body = {"prompt": "a", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(number)
        *_, last, _empty = lines
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert output == "failure: None cancelled: [0]\n"
    assert errors == ""
    assert "the server is stopping" in last
