"""What is counted and timed, for ``GET /metrics``; the names and their meaning stand in ``docs/serving.md``.

Label sets are bounded: layers and GPUs of the plan, finish reasons, routes and statuses.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

from runtime.requests import EngineProtocol
from runtime.server.placement import Placement
from runtime.server.state_collector import PREFIX, PlacementCollector, StateCollector

# Seconds. Finer than the usual ones where decode steps are: a millisecond or two.
STEP_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
FIRST_TOKEN_BUCKETS = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0),
)
TOKEN_BUCKETS = tuple(float(1 << power) for power in range(18))

disable_created_metrics()  # a second series per counter that no dashboard reads


class Metrics:
    """All metrics of one server.

    Args:
        engine: asked for its state at every reading.
        version: of the project.
        model_name: of the served model.
        placement: what is served, and how it goes, where that is known.
    """

    def __init__(
        self, engine: EngineProtocol, version: str, model_name: str, placement: Placement | None = None
    ) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self.registry)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's submission to its first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", STEP_BUCKETS
        )
        self.request_latency = self._histogram(
            "e2e_request_latency_seconds", "From a request's submission to its end.", REQUEST_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From a request's submission to its place in the batch.", FIRST_TOKEN_BUCKETS
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self.answer_length = self._histogram(
            "request_generation_tokens", "Generated tokens of a request that ended.", TOKEN_BUCKETS
        )
        self.decode_step = self._histogram("decode_step_seconds", "A decode step of the engine.", STEP_BUCKETS)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.requests_ended = self._counter(
            "request_success", "Requests that ended, by why they did.", "finished_reason"
        )
        self.http_requests = self._counter("http_requests", "HTTP requests answered.", "path", "status")
        info = Gauge(f"{PREFIX}info", "What is served, by what.", ("version", "model_name"), registry=self.registry)
        info.labels(version, model_name).set(1)
        for reason in ("stop", "length", "error", "cancelled"):  # so that rates begin at 0
            self.requests_ended.labels(reason)
        self.registry.register(StateCollector(engine))
        if placement is not None:
            placement.meter.on_decode_step = self.decode_step.observe
            self.registry.register(PlacementCollector(engine, placement))

    def count_http_request(self, path: str, status: str) -> None:
        """An HTTP request was answered; ``path`` is a route's pattern."""
        self.http_requests.labels(path, status).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)


def metrics_router(metrics: Metrics) -> APIRouter:
    """The route, in the format that the client accepts."""
    router = APIRouter()
    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format"}
    }

    @router.get("/metrics", response_class=Response, responses=text)
    async def read_metrics(request: Request) -> Response:
        """All metrics, in Prometheus' text format."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    return router
