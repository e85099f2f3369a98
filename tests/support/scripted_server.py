"""A server with OpenAI's streaming interface and a script: it answers after known delays and notes when it did."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

FIRST_S, NEXT_S = 0.06, 0.02


@dataclass
class Served:
    """One request as the server saw it; times of `time.perf_counter`."""

    headers: dict[str, str]
    body: dict[str, Any]
    received_s: float
    sent_s: list[float] = field(default_factory=list)


class ScriptedServer:
    """A context manager; ``url`` is where it listens.

    The first piece of text comes ``FIRST_S`` after the request, every further one ``NEXT_S`` later. A text prompt that
    names a fault gets it instead: ``refuse``, ``fail``, ``cut``, ``mute``, ``garbage``.
    """

    def __init__(self, usage_factor: int = 1) -> None:
        self.served: list[Served] = []
        self.most_open = 0
        self._usage_factor = usage_factor
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                lines = head.split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                if lines[0].startswith("GET"):
                    _answer(writer, 200, json.dumps({"data": [{"id": "scripted"}]}))
                    continue
                served = Served(headers, json.loads(content), time.perf_counter())
                self.served.append(served)
                self._open += 1
                self.most_open = max(self.most_open, self._open)
                try:
                    await self._stream(served, writer)
                finally:
                    self._open -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _stream(self, served: Served, writer: asyncio.StreamWriter) -> None:
        fault = served.body.get("prompt")
        if fault == "refuse":
            return _answer(writer, 429, json.dumps({"error": {"message": "the queue is full"}}))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        number = served.body["max_tokens"]
        for index in range(number):
            due_s = served.received_s + FIRST_S + index * NEXT_S
            await asyncio.sleep(due_s - time.perf_counter())
            if fault == "fail" and index == 1:
                _event(writer, {"error": {"message": "a rank is gone"}})
                break
            if fault == "cut" and index == 1:
                raise ConnectionResetError
            if fault == "garbage":
                _chunk(writer, b"data: {nonsense\n\n")
            elif fault != "mute":
                text = {"delta": {"content": " a"}} if "messages" in served.body else {"text": " a"}
                _event(writer, {"choices": [text | {"index": 0}]})
            served.sent_s.append(time.perf_counter())
            await writer.drain()
        else:
            usage = {"prompt_tokens": 7, "completion_tokens": number * self._usage_factor}
            _event(writer, {"choices": [], "usage": usage})
            _chunk(writer, b": a comment\n\ndata: [DO")
            _chunk(writer, b"NE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _answer(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())


def _event(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    _chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))
