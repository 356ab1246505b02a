"""What a server counts, in Prometheus's text form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from q3n_functional.serve_loop import EngineThread

OUTCOMES = ("finished", "cancelled", "refused", "failed")
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50)


class _EngineCollector(Collector):
    """The engine's own counts, read when they are asked for."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def collect(self) -> Iterator[Metric]:
        counts = self._thread.counts
        yield GaugeMetricFamily("q3n_requests_waiting", "Requests in the queue.", counts.waiting)
        yield GaugeMetricFamily("q3n_requests_running", "Requests in the batch.", counts.running)
        yield CounterMetricFamily("q3n_prompt_tokens", "Tokens of prompts.", counts.prompt_tokens)
        yield CounterMetricFamily("q3n_prefix_hit_tokens", "Tokens of prompts in the store.", counts.reused_tokens)
        yield CounterMetricFamily("q3n_drawn_tokens", "Tokens drawn.", counts.drawn_tokens)
        yield CounterMetricFamily("q3n_drafted_tokens", "Drafts verified.", counts.drafted_tokens)
        yield CounterMetricFamily("q3n_accepted_tokens", "Drafts that were right.", counts.accepted_tokens)
        rate = counts.accepted_tokens / max(counts.drafted_tokens, 1)
        yield GaugeMetricFamily("q3n_draft_acceptance_rate", "Share of all drafts that were right.", rate)
        yield CounterMetricFamily("q3n_engine_steps", "Steps of the engine.", self._thread.steps)


class Metrics:
    """The counts of one server; `registry` has them all.

    outcomes: HTTP requests by how they ended. first_token: seconds from when the engine is asked to the first token.
    """

    def __init__(self, thread: EngineThread) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(thread))
        self.outcomes = Counter("q3n_http_requests", "Requests by outcome.", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:
            self.outcomes.labels(outcome)
        about = "Seconds from when the engine is asked to the first token."
        self.first_token = Histogram("q3n_time_to_first_token_seconds", about, buckets=BUCKETS, registry=self.registry)
