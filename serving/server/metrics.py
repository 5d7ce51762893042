"""What `/metrics` shows: the engine's numbers under vLLM's names, so that its dashboards work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric

from serving.server.backend import Engine

GAUGES = {
    "num_requests_running": ("running", "Answers that the engine computes."),
    "num_requests_waiting": ("waiting", "Answers in the engine's queue."),
    "kv_cache_usage_perc": (
        "kv_cache_usage",
        "Fraction of pages in use, 0 to 1; cached ones that nobody holds are free.",
    ),
    "cache_bytes_per_token": ("cache_bytes_per_token", "Bytes of a token's keys and values."),
}
COUNTERS = {
    "num_preemptions": ("preemptions", "Answers that lost their pages for a while."),
    "prefix_cache_queries": ("prefix_queries", "Tokens looked for in the cache of prefixes."),
    "prefix_cache_hits": ("prefix_hits", "Tokens found in the cache of prefixes."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generation_tokens", "Tokens generated."),
}
LABELLED_COUNTERS = {
    "request_success": ("finished", "finished_reason", "Answers that ended, by reason."),
    "compilations": ("compilations", "phase", "Programs compiled; none should be in serving."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's arrival to its first token.",
    "inter_token_latency_seconds": "Between two tokens of an answer.",
    "request_time_per_output_token_seconds": "Mean time between the tokens of an answer.",
    "e2e_request_latency_seconds": "From arrival to end.",
    "request_queue_time_seconds": "From arrival to the first step.",
    "request_prefill_time_seconds": "From the first step to the first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_inference_time_seconds": "From the first step to the last token.",
    "request_prompt_tokens": "Tokens of a prompt.",
    "request_generation_tokens": "Tokens of an answer.",
    "request_params_max_tokens": "The max_tokens asked for.",
    "request_params_n": "The n asked for.",
    "iteration_tokens_total": "Tokens of a step.",
    "step_seconds": "Time of a step.",
}
OLDER_NAMES = {"time_per_output_token_seconds": "inter_token_latency_seconds"}


class Metrics:
    """The metrics of one server, read from its engine each time the page is."""

    def __init__(self, engine: Engine, prefix: str = "sheaf") -> None:
        self._engine, self._prefix = engine, prefix
        self._labels = {"model_name": engine.model_name, "engine": "0"}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> tuple[bytes, str]:
        """The page in Prometheus' text format, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def describe(self) -> list[Metric]:
        """Nothing: the engine is not asked before somebody reads the page."""
        return []

    def collect(self) -> Iterator[Metric]:
        """A family for each number that the engine has."""
        stats = self._engine.stats()
        for name, (field, text) in GAUGES.items():
            if (value := getattr(stats, field, None)) is not None:
                yield self._single(GaugeMetricFamily, name, text, value)
        for name, (field, text) in COUNTERS.items():
            if (value := getattr(stats, field, None)) is not None:
                yield self._single(CounterMetricFamily, name, text, value)
        for name, (field, label, text) in LABELLED_COUNTERS.items():
            yield self._labelled(name, text, label, getattr(stats, field, None) or {})
        found = getattr(stats, "histograms", None) or {}
        for name, text in HISTOGRAMS.items():
            if name in found:
                yield self._histogram(name, text, found[name])
        for name, new in OLDER_NAMES.items():
            if new in found:
                yield self._histogram(name, HISTOGRAMS[new], found[new])
        yield self._cache_config(stats)
        if self._engine.adapters:
            yield self._adapters(stats)

    def _single(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family = kind(f"{self._prefix}:{name}", text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), float(value))
        return family

    def _labelled(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        labels = (*self._labels, label)
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=labels)
        for value, count in values.items():
            family.add_metric((*self._labels.values(), value), float(count))
        return family

    def _histogram(self, name: str, text: str, histogram: Any) -> Metric:
        """Prometheus' buckets count everything up to their edge."""
        edges = [*(str(float(edge)) for edge in histogram.edges), "+Inf"]
        counts = itertools.accumulate(map(float, histogram.counts))
        family = HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=tuple(self._labels))
        buckets = list(zip(edges, counts, strict=True))
        family.add_metric(tuple(self._labels.values()), buckets, float(histogram.total))
        return family

    def _adapters(self, stats: Any) -> Metric:
        labels = {
            **self._labels,
            "max_lora": str(len(self._engine.adapters)),
            "running_lora_adapters": ",".join(stats.running_adapters),
            "waiting_lora_adapters": ",".join(stats.waiting_adapters),
        }
        name, text = f"{self._prefix}:lora_requests_info", "Adapters of requests, as labels."
        family = GaugeMetricFamily(name, text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), 1.0)
        return family

    def _cache_config(self, stats: Any) -> Metric:
        told = {"block_size": "page_size", "num_gpu_blocks": "pages_total"}
        values = {name: str(getattr(stats, field, "")) for name, field in told.items()}
        labels = {**self._labels, **values}
        name, text = f"{self._prefix}:cache_config_info", "Settings of the cache, as labels."
        family = GaugeMetricFamily(name, text, labels=tuple(labels))
        family.add_metric(tuple(labels.values()), 1.0)
        return family
