"""A live server on a free port, in a thread, with a scripted engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from hypothesis import settings

from runtime.server import bind_socket, create_app
from runtime.server.listener import socket_url
from tests.runtime.server.scripted_engine import ScriptedEngine, Step, byte_level_tokenizer

MODEL = "team/demo"

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@dataclass
class LiveServer:
    """A server with the engine behind it, and clients for it."""

    engine: ScriptedEngine
    url: str
    tokenizer: Any
    app: Any
    placement: Any
    client: openai.OpenAI = field(init=False)
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def script(self, *scripts: str | list[Step]) -> None:
        """Let the next requests be answered with these texts or steps."""
        encoded = [self.tokenizer.encode(item) if isinstance(item, str) else item for item in scripts]
        self.engine.scripts = [[] for _ in self.engine.submitted] + [list(item) for item in encoded]

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Post a JSON body."""
        return self.http.post(path, json=body)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers that end with the tests."""
    running: list[tuple[uvicorn.Server, threading.Thread, LiveServer]] = []

    def start(tokenizer: Any, engine: ScriptedEngine | None = None, **options: Any) -> LiveServer:
        engine = engine or ScriptedEngine()
        app = create_app(engine, tokenizer, MODEL, created=1_700_000_000, **options)
        server_socket = bind_socket("127.0.0.1", 0)
        server_socket.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([server_socket],), daemon=True)
        thread.start()
        live = LiveServer(engine, socket_url(server_socket), tokenizer, app, options.get("placement"))
        running.append((server, thread, live))
        return live

    yield start
    for server, thread, live in running:
        live.client.close()
        live.http.close()
        live.engine.shutdown()
        # Skips the grace that a busy server would need.
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def shared_server(serve: Callable[..., LiveServer], tokenizer: Any) -> LiveServer:
    return serve(tokenizer)


@pytest.fixture
def server(shared_server: LiveServer) -> LiveServer:
    """The server that all tests share, with a fresh engine."""
    shared_server.engine.reset()
    return shared_server
