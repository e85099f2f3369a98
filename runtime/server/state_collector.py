"""Metrics that are read off the engine and its meter when somebody asks, instead of being kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.load import active_experts, balancedness
from runtime.requests import EngineProtocol
from runtime.server.placement import Placement

PREFIX = "expertplan_"


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


class StateCollector(Collector):
    """The queue, the batch and the cache, as the engine's status has them."""

    def __init__(self, engine: EngineProtocol) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The families, with what holds now."""
        status = self._engine.status()
        yield _gauge("num_requests_running", "Requests in the batch.", status.running)
        yield _gauge("num_requests_waiting", "Requests that wait for a place in the batch.", status.waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the key/value cache in use, from 0 to 1.", status.cache_usage)
        yield _counter(
            "num_preemptions", "Requests that lost their place in the cache and resumed.", status.preemptions
        )
        yield _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", status.prompt_tokens)
        yield _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", status.prefix_hit_tokens)


class PlacementCollector(Collector):
    """What the plan makes the GPUs do; layers by their number in the model."""

    def __init__(self, engine: EngineProtocol, placement: Placement) -> None:
        self._engine, self._placement = engine, placement

    def collect(self) -> Iterator[Metric]:
        """The families, with what holds now."""
        plan, reading = self._placement.plan, self._placement.meter.read()
        layers = [str(layer) for layer in plan.layer_ids]
        gpus = [str(gpu) for gpu in range(plan.num_gpus)]
        zeros = [[0.0] * len(gpus) for _ in layers]

        tokens = CounterMetricFamily(
            f"{PREFIX}expert_tokens", "Token-expert pairs computed, prefill included.", labels=("layer", "gpu")
        )
        active = GaugeMetricFamily(
            f"{PREFIX}active_experts",
            "Mean number of experts that a decode step of the last seconds read.",
            labels=("layer", "gpu"),
        )
        balance = GaugeMetricFamily(
            f"{PREFIX}balancedness", "Mean over busiest GPU's tokens in the last seconds.", labels=("layer",)
        )
        totals = zeros if reading.total is None else reading.total.pairs.sum(dim=2).tolist()
        means = zeros if reading.recent is None else active_experts(reading.recent).tolist()
        shares = [1.0] * len(layers) if reading.recent is None else balancedness(reading.recent).tolist()
        for index, layer in enumerate(layers):
            balance.add_metric((layer,), shares[index])
            for place, gpu in enumerate(gpus):
                tokens.add_metric((layer, gpu), totals[index][place])
                active.add_metric((layer, gpu), means[index][place])
        yield from (tokens, active, balance)

        exchanged = CounterMetricFamily(
            f"{PREFIX}exchange_bytes", "Hidden states sent between GPUs, over all GPUs.", labels=("mode",)
        )
        sent = 0 if reading.total is None else reading.total.exchanged_bytes
        exchanged.add_metric((self._placement.exchange,), sent)
        yield exchanged
        predicted = self._placement.predicted_step_us(self._engine.status().running)
        yield _gauge(
            "predicted_decode_step_seconds",
            "MoE layers and exchange of a decode step as the plan predicts them for the requests that run now.",
            math.nan if predicted is None else predicted / 1e6,
        )
