"""`/metrics`: what is counted and timed, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from placement.plan import PlacementPlan
from runtime.load import Load
from runtime.requests import SamplingParameters, StepTime, TokenEvent
from runtime.server import Placement
from runtime.server.metered_engine import MeteredEngine
from runtime.server.metrics import Metrics
from runtime.step_meter import StepMeter
from tests.runtime.server.scripted_engine import ScriptedEngine

PATH = "/v1/completions"
DASHBOARD = Path(__file__).resolve().parents[3] / "examples" / "grafana" / "expertplan.json"
PLAN = PlacementPlan(
    model="m",
    num_experts=4,
    top_k=2,
    layer_ids=(1, 3),
    slots=(((0, 1, 2), (3, 0)), ((1, 3), (2, 0))),
    predicted={"step_us": {"plan": {"1": 100.0, "8": 170.0}}},
)
LOAD = Load(
    pairs=torch.tensor([[[4, 2, 0], [1, 1, 0]], [[3, 1, 0], [2, 2, 0]]]),
    active=torch.tensor([[[2, 1, 0], [1, 1, 0]], [[2, 1, 0], [1, 2, 0]]]),
    steps=2,
    exchanged_bytes=4096,
)
Labels = tuple[tuple[str, str], ...]


def parse(text: str) -> dict[tuple[str, Labels], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(server: Any) -> Callable[..., float]:
    """Values of the server's metrics now, by name without prefix and labels."""
    values = parse(server.http.get("/metrics").text)
    return lambda name, **labels: values[f"expertplan_{name}", tuple(sorted(labels.items()))]


@pytest.fixture
def own(serve: Callable[..., Any], tokenizer: Any) -> Any:
    """A server whose counters begin at 0."""
    return serve(tokenizer, ScriptedEngine(), placement=Placement(PLAN, StepMeter(lambda: LOAD), "alltoall"))


def test_requests(own: Any) -> None:
    hold = threading.Event()
    own.script(
        [TokenEvent(5, None, queued_s=0.3), 6, 7], [5, 6, 7, 8, 9], "a stop here", [5, TokenEvent(None, "error", "x")]
    )
    assert own.post(PATH, prompt=[1, 2, 3], max_tokens=9).status_code == 200
    assert own.post(PATH, prompt=[1], max_tokens=4).status_code == 200
    assert own.post(PATH, prompt=[1, 2], max_tokens=30, stop="stop").json()["choices"][0]["finish_reason"] == "stop"
    assert own.post(PATH, prompt=[1]).status_code == 500
    assert own.post(PATH, prompt=[]).status_code == 400
    own.engine.scripts.append([5, hold])
    own.engine.cancel_seen.clear()  # by now the stop string has been
    with own.http.stream("POST", PATH, json={"prompt": [1], "stream": True}) as response:
        next(response.iter_lines())
    assert own.engine.cancel_seen.wait(10)
    value = read(own)
    by_reason = {r: value("request_success_total", finished_reason=r) for r in ("stop", "length", "error")}
    assert by_reason == {"stop": 2, "length": 1, "error": 1}
    assert value("prompt_tokens_total") == 8
    assert value("request_prompt_tokens_count") == 5
    least, most = (3 + 4 + len(own.tokenizer.encode(text)) + 1 + 1 for text in ("a stop", "a stop here"))
    assert least <= value("generation_tokens_total") <= most
    assert value("time_to_first_token_seconds_count") == 5
    assert value("e2e_request_latency_seconds_count") == 3
    assert value("request_queue_time_seconds_count") == 1
    assert value("request_queue_time_seconds_sum") == 0.3
    # The stream that nobody read to its end is counted once the server has noticed.
    assert value("http_requests_total", path=PATH, status="200") in (3, 4)
    assert value("http_requests_total", path=PATH, status="400") == 1
    assert value("http_requests_total", path=PATH, status="500") == 1


def test_paths_are_patterns(own: Any) -> None:
    own.http.get("/v1/models/team/demo")
    own.http.get("/v1/models/a%20secret")
    own.http.get("/no/such/page")
    own.http.post(PATH, content="x" * (5 << 20))
    value = read(own)
    assert value("http_requests_total", path="/v1/models/{model_id:path}", status="200") == 1
    assert value("http_requests_total", path="/v1/models/{model_id:path}", status="404") == 1
    assert value("http_requests_total", path="other", status="404") == 1
    assert value("http_requests_total", path="other", status="413") == 1


def test_state_and_placement(own: Any) -> None:
    meter = StepMeter(lambda: LOAD)
    own.engine.state = {
        "running": 8,
        "waiting": 2,
        "cache_usage": 0.25,
        "preemptions": 3,
        "prompt_tokens": 100,
        "prefix_hit_tokens": 64,
    }
    idle = read(own)
    assert idle("balancedness", layer="3") == 1
    assert idle("expert_tokens_total", layer="1", gpu="0") == 0
    meter = own.placement.meter
    for _ in range(2):
        meter.stepped(StepTime(0.004, batch=8), 8)
        meter.idle()
    value = read(own)
    assert value("num_requests_running") == 8
    assert value("num_requests_waiting") == 2
    assert value("kv_cache_usage_perc") == 0.25
    assert value("num_preemptions_total") == 3
    assert value("prefix_cache_queries_total") == 100
    assert value("prefix_cache_hits_total") == 64
    assert value("expert_tokens_total", layer="1", gpu="0") == 12
    assert value("expert_tokens_total", layer="3", gpu="1") == 8
    assert value("active_experts", layer="1", gpu="0") == 1.5
    assert value("balancedness", layer="1") == pytest.approx(4 / 6)
    assert value("exchange_bytes_total", mode="alltoall") == 8192
    assert value("decode_step_seconds_count") == 2
    assert value("decode_step_seconds_sum") == 0.008
    assert value("predicted_decode_step_seconds") == pytest.approx(170e-6)


def test_every_metric_of_the_dashboard_is_served(own: Any) -> None:
    own.http.get("/health")
    served = {name for name, _ in parse(own.http.get("/metrics").text)}
    dashboard = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    asked = {name for query in queries for name in re.findall(r"expertplan_\w+", query)}
    assert len(asked) >= 20
    assert asked <= served, asked - served
    assert all("expertplan_" in query for query in queries)
    # And it shows all that is peculiar to this server.
    own_families = {name for name in served if re.search(r"expert|balanced|exchange|predicted|decode_step", name[11:])}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked}
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in own_families} <= shown


def test_times_of_a_request() -> None:
    """First token, gaps and end, by a clock that we turn."""
    now = [0.0]
    engine = ScriptedEngine()
    metrics = Metrics(engine, "0", "m")
    events: list[Callable[[TokenEvent], None]] = []
    engine.submit = lambda prompt, sampling, on_event, user="": events.append(on_event) or 7  # type: ignore[method-assign, func-returns-value]
    metered = MeteredEngine(engine, metrics, clock=lambda: now[0])
    heard: list[TokenEvent] = []
    assert metered.submit([1, 2], SamplingParameters(), heard.append) == 7
    for seconds, event in (
        (1.5, TokenEvent(5, None)),
        (0.25, TokenEvent(6, None)),
        (0.5, TokenEvent(7, "length")),
    ):
        now[0] += seconds
        events[0](event)
    assert [event.token_id for event in heard] == [5, 6, 7]
    values = parse(_text(metrics))
    sums = {name.removeprefix("expertplan_"): value for (name, labels), value in values.items() if not labels}
    assert sums["time_to_first_token_seconds_sum"] == 1.5
    assert (sums["inter_token_latency_seconds_count"], sums["inter_token_latency_seconds_sum"]) == (2, 0.75)
    assert sums["e2e_request_latency_seconds_sum"] == 2.25
    assert sums["request_generation_tokens_sum"] == 3


def _text(metrics: Metrics) -> str:
    from prometheus_client import generate_latest

    return generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [("", "text/plain"), ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text")],
)
def test_formats(own: Any, accept: str, content_type: str) -> None:
    response = own.http.get("/metrics", headers={"Accept": accept})
    assert response.headers["content-type"].startswith(content_type)
    assert "expertplan_info{" in response.text
    assert "_created" not in response.text
