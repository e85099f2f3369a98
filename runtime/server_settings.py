"""Settings of the HTTP server (filled from ``conf/serve.yaml``)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, Self

from runtime.errors import InputError
from runtime.settings import Settings

API_KEY_VARIABLE = "EXPERTPLAN_API_KEY"
SERVER_URL = re.compile(r"https?://([\w.-]+|\[[\da-f:.]+\])(?::(\d{1,5}))?", re.ASCII | re.IGNORECASE)
MAX_DRAIN_S = 25  # whoever stops a server by SIGTERM usually kills it after 30 s


@dataclass(frozen=True)
class ServerSettings(Settings):
    """Where a plan is served, under what name, and to whom.

    Attributes:
        host: name or address to listen on.
        port: to listen on; 0 takes a free one.
        served_model_name: what ``/v1/models`` calls the model; None takes the model's folder name or hub id.
        api_key: that requests must bring; None takes the environment's `API_KEY_VARIABLE`, and without that either,
            everyone is served. Never shown.
        cors_origins: web pages from these origins may send requests; ``*`` for all.
        drain_timeout_s: how long accepted requests may take to finish after SIGTERM.
        log_format: ``text`` or ``json`` (an object per line).
        compare_url: of a second server, which the page asks beside this one; None for none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    drain_timeout_s: float = 20.0
    log_format: str = "text"
    compare_url: str | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Take the server's keys out of a composed configuration, and the API key from the environment if need be."""
        origins = config["cors_origins"]
        if not isinstance(origins, list | tuple):
            raise InputError(f"cors_origins={origins}: expected a list, such as [https://example.org]")
        key = os.environ.get(API_KEY_VARIABLE) if config["api_key"] is None else config["api_key"]
        return super().from_config(config | {"cors_origins": tuple(origins), "api_key": key})

    def __post_init__(self) -> None:
        if not isinstance(self.host, str):
            raise InputError(f"host={self.host}: expected a name or an address of this machine")
        if type(self.port) is not int:
            raise InputError(f"port={self.port}: expected an integer from 0 to 65535")
        if self.served_model_name is not None and not isinstance(self.served_model_name, str):
            raise InputError(f"served_model_name={self.served_model_name}: expected text")
        key = self.api_key
        if key is not None and not (
            isinstance(key, str) and key and key.isascii() and key.isprintable() and key == key.strip()
        ):
            # Without the value, which may be nearly right.
            expected = "printable ASCII text, not empty, without spaces around it"
            raise InputError(f"api_key or {API_KEY_VARIABLE}: expected {expected}")
        for origin in self.cors_origins:
            if not isinstance(origin, str):
                raise InputError(f"cors_origins has {origin}: expected text such as https://example.org")
        timeout = self.drain_timeout_s
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= MAX_DRAIN_S:
            raise InputError(f"drain_timeout_s={timeout}: expected a number of seconds from 0 to {MAX_DRAIN_S}")
        if self.log_format not in ("text", "json"):
            raise InputError(f"log_format={self.log_format}: expected text or json")
        url = self.compare_url
        match = SERVER_URL.fullmatch(url) if isinstance(url, str) else None
        if url is not None and (match is None or int(match[2] or 1) not in range(1, 65536)):
            raise InputError(
                f"compare_url={url}: expected http://HOST:PORT of a second server, without /v1 or a / after it"
            )
