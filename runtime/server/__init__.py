"""The OpenAI-compatible HTTP server: text, chat templates, stop strings and streaming above an engine of tokens."""

from __future__ import annotations

from runtime.server.app import create_app
from runtime.server.listener import bind_socket, run_server
from runtime.server.placement import Placement
from runtime.server.request_log import set_up_logs

__all__ = ["Placement", "bind_socket", "create_app", "run_server", "set_up_logs"]
