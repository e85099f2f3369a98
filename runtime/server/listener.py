"""The listening socket and the life of the server process: start, signals, a failed engine, a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from profiler.errors import InputError
from runtime.requests import EngineProtocol
from runtime.server.context import ServerContext

STATUS_INTERVAL_S = 0.2
UNREAD_TIMEOUT_S = 2
STOPPING = "the server is stopping"


def bind_socket(host: str, port: int) -> socket.socket:
    """Take an address, before the long work of loading a model; the server listens on it later.

    Args:
        host: a name or address, IPv4 or IPv6.
        port: 1..65535, or 0 for a free one (``getsockname`` tells which).

    Raises:
        InputError: the address does not exist, is in use or is not allowed.
    """
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected 0 to 65535; choose another port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InputError(f"host {host!r}: {error.strerror}; give a name or address of this machine") from error
    server_socket = socket.socket(family, kind, protocol)
    try:
        server_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server_socket.bind(address)
    except OSError as error:
        server_socket.close()
        raise _bind_error(where, error) from error
    return server_socket


def run_server(
    app: FastAPI,
    server_socket: socket.socket,
    engine: EngineProtocol,
    *,
    grace_seconds: float = 5,
    on_ready: Callable[[str], None] | None = None,
    on_signal: Callable[[], None] | None = None,
) -> str | None:
    """Serve until SIGINT, SIGTERM or a failure of the engine; requests that run then have ``grace_seconds`` to end.

    The caller shuts the engine down afterwards.

    Args:
        app: what ``create_app`` made.
        server_socket: what ``bind_socket`` made; closed in the end.
        engine: watched for a failure.
        grace_seconds: after this time the requests that are left end with an error. A second SIGINT cuts them at once.
        on_ready: called with the server's URL once it accepts connections.
        on_signal: called by the first signal.

    Returns:
        None after a signal, or the engine's failure in one line.

    Raises:
        InputError: another process began to listen on the address since ``bind_socket``.
    """
    server = _Server(app, grace_seconds, on_signal)
    url = socket_url(server_socket)
    try:
        _listen(server_socket, server.config.backlog)
        return asyncio.run(_serve(server, server_socket, engine, (lambda: on_ready(url)) if on_ready else None))
    finally:
        server_socket.close()


def socket_url(server_socket: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = server_socket.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(server_socket: socket.socket, backlog: int) -> None:
    """Listen, before uvicorn does so again: only here a lost address is surely what an OSError means."""
    try:
        server_socket.listen(backlog)
    except OSError as error:
        host, port = server_socket.getsockname()[:2]
        raise _bind_error(f"{host}:{port}", error) from error


async def _serve(
    server: _Server, server_socket: socket.socket, engine: EngineProtocol, on_ready: Callable[[], None] | None
) -> str | None:
    watch = asyncio.create_task(_watch(server, engine, on_ready))
    try:
        await server.serve(sockets=[server_socket])
    finally:
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
    # A signal to the whole process group ends the engine's ranks too; that is not a failure.
    return None if server.interrupted else engine.status().failure


async def _watch(server: _Server, engine: EngineProtocol, on_ready: Callable[[], None] | None) -> None:
    """Say when the server is up, and end it when the engine fails."""
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        if on_ready is not None:
            on_ready()
        while (failure := engine.status().failure) is None:
            await asyncio.sleep(STATUS_INTERVAL_S)
        # An engine that died in the middle of a step may not have told its requests.
        server.context.abort_generations(failure)
    finally:
        server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server with another end: of the process (not by the signal again) and of the running requests."""

    def __init__(self, app: FastAPI, grace_seconds: float, on_signal: Callable[[], None] | None) -> None:
        # uvicorn's own timeout is for clients that do not read: it cancels, which leaves them without a word.
        timeout = math.ceil(grace_seconds) + UNREAD_TIMEOUT_S
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # its messages go where the process's others go
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=timeout,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        self.context: ServerContext = app.state.context
        self._reading: set[asyncio.Timeout] = app.state.reading
        self.interrupted = False
        self._grace_seconds = grace_seconds
        self._on_signal = on_signal

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the running requests; those that outlast the grace get an error, half-sent ones at once."""
        loop = asyncio.get_running_loop()
        for deadline in self._reading:
            deadline.reschedule(loop.time())
        timer = loop.call_later(self._grace_seconds, self.context.abort_generations, STOPPING)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; called by a signal."""
        if not self.interrupted:
            self.interrupted = True
            self.context.stopping = STOPPING
            if self._on_signal is not None:
                self._on_signal()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, and do not send it again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _bind_error(where: str, error: OSError) -> InputError:
    reason = {
        errno.EADDRINUSE: "the port is in use; choose another one or stop the process that listens there",
        errno.EACCES: "not allowed; choose a port from 1024 on",
        errno.EADDRNOTAVAIL: "this machine does not have that address; give one that it has",
    }.get(error.errno or 0, f"{error.strerror}; choose another host or port")
    return InputError(f"cannot listen on {where}: {reason}")
