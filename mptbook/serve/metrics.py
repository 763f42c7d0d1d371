"""Measurements for Prometheus, under the names that vLLM gave them.

Source: vLLM, "Production metrics"; dashboards that were made for it show these too.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mptbook.infer.engine import Engine

LABELS = ("model_name",)
SECONDS = {
    "time_to_first_token": (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    "inter_token_latency": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    "e2e_request_latency": (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
}


class Metrics:
    """Counts and times of one engine.

    Give `observe` to the engine, then the engine to `watch`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.registry = CollectorRegistry()
        self._seconds = {
            what: Histogram(
                f"vllm:{what}_seconds",
                f"Seconds of {what.replace('_', ' ')}.",
                LABELS,
                buckets=buckets,
                registry=self.registry,
            ).labels(name)
            for what, buckets in SECONDS.items()
        }

    def observe(self, what: str, seconds: float) -> None:
        self._seconds[what].observe(seconds)

    def watch(self, engine: Engine) -> None:
        self.registry.register(_Counts(self._name, engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Counts:
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name, self._engine = name, engine

    def collect(self) -> Iterator[Metric]:
        engine, counts, slots = self._engine, self._engine.counts, self._engine.slots
        running = engine.running
        used = sum(slots.lengths[one.slot] for one in running) / (slots.n_slots * slots.n_tokens)
        gauges = {
            "num_requests_running": ("Choices that are read or written.", len(running)),
            "num_requests_waiting": ("Choices that wait for a slot.", len(engine.waiting)),
            "kv_cache_usage_perc": ("Share of the cache that those hold; 1 is all.", used),
        }
        for name, (what, value) in gauges.items():
            yield self._metric(GaugeMetricFamily, name, what, value)
        totals = {
            "prefix_cache_queries": ("Tokens of prompts.", counts.prompt_tokens),
            "prefix_cache_hits": ("Of those, not read again.", counts.reused_tokens),
            "prompt_tokens": ("Tokens of prompts.", counts.prompt_tokens),
            "generation_tokens": ("Tokens written.", counts.generation_tokens),
        }
        for name, (what, value) in totals.items():
            yield self._metric(CounterMetricFamily, name, what, value)
        ended = CounterMetricFamily(
            "vllm:request_success",
            "Choices by how they ended.",
            labels=(*LABELS, "finished_reason"),
        )
        reasons = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
        for reason, vllms in reasons.items():
            ended.add_metric((self._name, vllms), counts.finished.get(reason, 0))
        yield ended

    def _metric(self, kind: Any, name: str, what: str, value: float) -> Metric:
        metric = kind(f"vllm:{name}", what, labels=LABELS)
        metric.add_metric((self._name,), value)
        return metric
