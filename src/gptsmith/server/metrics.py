"""Metrics for Prometheus, served at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gptsmith.server.concurrency import ConcurrencyLimiter
from gptsmith.server.generation import Generation
from gptsmith.server.models import ModelRegistry

# upper bounds of the histograms' buckets, in seconds
_FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of requests, and gauges read from the limiter and the engines when they are scraped."""

    def __init__(self, models: ModelRegistry, limiter: ConcurrencyLimiter) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gptsmith_requests", "Completed requests.", ["endpoint", "model", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "gptsmith_request_seconds",
            "Time from the arrival of a request to the end of its response.",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("gptsmith_prompt_tokens", "Prompt tokens.", ["model"], registry=self.registry)
        self.generated_tokens = Counter(
            "gptsmith_generated_tokens", "Generated tokens.", ["model"], registry=self.registry
        )
        self.first_token = Histogram(
            "gptsmith_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token.",
            ["model"],
            buckets=_FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "gptsmith_inter_token_seconds",
            "Time between consecutive tokens of a sample.",
            ["model"],
            buckets=_INTER_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_StateCollector(models, limiter))

    def record_request(self, endpoint: str, model: str | None, status: int, seconds: float) -> None:
        """Count a completed request. endpoint: the route, never the path itself, which clients choose."""
        self.requests.labels(endpoint, model or "", str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)

    def record_generation(self, generation: Generation) -> None:
        """Count the tokens and latencies of a generation that has ended."""
        name = generation.served.base
        self.prompt_tokens.labels(name).inc(generation.prompt_tokens)
        self.generated_tokens.labels(name).inc(generation.tokens_seen)
        if generation.timing.first is not None:
            self.first_token.labels(name).observe(generation.timing.first - generation.timing.started_at)
        between = self.between_tokens.labels(name)
        for gap in generation.timing.gaps:
            between.observe(gap)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _StateCollector(Collector):
    """The state of the limiter and of the loaded models' engines at the time of the scrape."""

    def __init__(self, models: ModelRegistry, limiter: ConcurrencyLimiter) -> None:
        self.models, self.limiter = models, limiter

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("gptsmith_requests_running", "Requests being processed.")
        running.add_metric([], self.limiter.in_use)
        yield running
        queue = GaugeMetricFamily("gptsmith_queue_depth", "Requests waiting in the queue.")
        queue.add_metric([], self.limiter.waiting)
        yield queue
        gauges = {
            "sequences_running": "Sequences being generated.",
            "sequences_waiting": "Sequences waiting to be scheduled.",
            "kv_cache_use": "Fraction of the KV cache's blocks in use, 0 to 1.",
            "kv_cache_blocks": "Blocks in the KV cache.",
            "prefix_hit_rate": "Fraction of prompt tokens found in the prefix cache, 0 to 1.",
            "speculation_acceptance": "Fraction of drafted tokens that were accepted, 0 to 1.",
        }
        counters = {
            "passes": "Forward passes of the model.",
            "preemptions": "Times a sequence was preempted to free cache blocks.",
            "prefix_tokens": "Prompt tokens looked up in the prefix cache.",
            "prefix_hits": "Prompt tokens found in the prefix cache.",
            "drafted_tokens": "Tokens drafted by speculative decoding.",
            "accepted_tokens": "Drafted tokens that were accepted.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            name: GaugeMetricFamily(f"gptsmith_{name}", text, labels=["model"]) for name, text in gauges.items()
        }
        families |= {
            name: CounterMetricFamily(f"gptsmith_{name}", text, labels=["model"]) for name, text in counters.items()
        }
        for model, loaded in self.models.loaded().items():
            stats = loaded.engine.stats
            values = {
                "sequences_running": stats.running,
                "sequences_waiting": stats.waiting,
                "kv_cache_use": stats.cache_use,
                "kv_cache_blocks": stats.blocks,
                "prefix_hit_rate": stats.prefix_hit_rate,
                "speculation_acceptance": stats.acceptance_rate,
                "passes": stats.steps,
                "preemptions": stats.preemptions,
                "prefix_tokens": stats.prefix_tokens,
                "prefix_hits": stats.prefix_hits,
                "drafted_tokens": stats.drafted,
                "accepted_tokens": stats.accepted,
            }
            for name, value in values.items():
                families[name].add_metric([model], value)
        yield from families.values()
