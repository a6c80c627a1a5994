"""What Prometheus is told at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gptsmith.server.concurrency import Gate
from gptsmith.server.generation import Work
from gptsmith.server.models import Models

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    def __init__(self, models: Models, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gptsmith_requests", "Requests answered.", ["endpoint", "model", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "gptsmith_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["endpoint"],
            buckets=_WHOLE,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("gptsmith_prompt_tokens", "Tokens of prompts.", ["model"], registry=self.registry)
        self.generated_tokens = Counter("gptsmith_generated_tokens", "Tokens made.", ["model"], registry=self.registry)
        self.first_token = Histogram(
            "gptsmith_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=_FIRST,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "gptsmith_inter_token_seconds",
            "Between two tokens of one text.",
            ["model"],
            buckets=_BETWEEN,
            registry=self.registry,
        )
        self.registry.register(_State(models, gate))

    def answered(self, endpoint: str, model: str | None, status: int, seconds: float) -> None:
        """An exchange is over. endpoint: the route; never a path that somebody made up."""
        self.requests.labels(endpoint, model or "", str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)

    def worked(self, work: Work) -> None:
        """The engine is done with a request."""
        name = work.served.base
        self.prompt_tokens.labels(name).inc(work.prompt_tokens)
        self.generated_tokens.labels(name).inc(work.tokens_seen)
        if work.timing.first is not None:
            self.first_token.labels(name).observe(work.timing.first - work.timing.began)
        between = self.between_tokens.labels(name)
        for gap in work.timing.gaps:
            between.observe(gap)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    """What is the case at the moment of asking."""

    def __init__(self, models: Models, gate: Gate) -> None:
        self.models, self.gate = models, gate

    def collect(self) -> Iterator[Metric]:
        inside = GaugeMetricFamily("gptsmith_requests_running", "Requests being worked on.")
        inside.add_metric([], self.gate.inside)
        yield inside
        queue = GaugeMetricFamily("gptsmith_queue_depth", "Requests that wait for a place.")
        queue.add_metric([], self.gate.waiting)
        yield queue
        gauges = {
            "sequences_running": "Texts in the engine's passes.",
            "sequences_waiting": "Texts that wait for the engine.",
            "kv_cache_use": "The share of the KV cache's blocks that are in use, 0 to 1.",
            "kv_cache_blocks": "Blocks of the KV cache.",
            "prefix_hit_rate": "The share of prompt tokens that were known already, 0 to 1.",
            "speculation_acceptance": "The share of tokens guessed ahead that were right, 0 to 1.",
        }
        counters = {
            "passes": "Passes over the model.",
            "preemptions": "Times that a text had to give up its blocks.",
            "prefix_tokens": "Prompt tokens that were looked for among known ones.",
            "prefix_hits": "And found.",
            "drafted_tokens": "Tokens that were guessed ahead.",
            "accepted_tokens": "And rightly so.",
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
