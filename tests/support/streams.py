"""Streams of completions that are read in threads, to see how they end."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx

END_S = 30


class Stream(threading.Thread):
    """Reads a stream to its end, whatever that is.

    Attributes:
        begun: the server has accepted the request.
        flowing: a first event has come.
    """

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, body
        self.begun = threading.Event()
        self.flowing = threading.Event()
        self.events: list[dict[str, Any]] = []
        self.complete = False
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=60) as response:
            assert response.status_code == 200
            self.begun.set()
            for line in response.iter_lines():
                self.complete = line == "data: [DONE]" or self.complete
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.flowing.set()

    def end(self) -> str:
        """ "complete", or the error that the last event tells."""
        self.join(END_S)
        assert not self.is_alive()
        return "complete" if self.complete else str(self.events[-1]["error"]["message"])
