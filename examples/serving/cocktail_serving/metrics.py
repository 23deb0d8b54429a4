"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Answer, Engine

__all__ = ["Metrics"]

BUCKETS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counts what an engine does, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "cocktail_requests", "Requests for the model by HTTP status.", ["status"], registry=registry
        )
        self._latency = Histogram(
            "cocktail_request_latency_seconds",
            "Seconds from a request's arrival in the queue to its answer.",
            buckets=BUCKETS,
            registry=registry,
        )
        self._run = Histogram(
            "cocktail_network_run_seconds",
            "Seconds that a network took for a request.",
            ["network"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._examples = Counter("cocktail_examples", "Examples answered by network.", ["network"], registry=registry)
        self._switches = Counter("cocktail_switches", "Changes to a network.", ["network"], registry=registry)
        self._active = Gauge(
            "cocktail_active_network", "1 for the network that the next request sees.", ["network"], registry=registry
        )
        for name in engine.networks:
            self._active.labels(name).set(0)
            self._switches.labels(name)
            self._examples.labels(name)
            self._run.labels(name)
        self._active.labels(engine.active.name).set(1)
        controller = engine.controller
        gauges = {
            "cocktail_queue_length": ("Requests that wait.", lambda: engine.waiting),
            "cocktail_accuracy_expected": ("The active network's metric in the bundle.", self._accuracy),
            "cocktail_latency_goal_seconds": ("The goal.", lambda: controller.policy.goal),
            "cocktail_latency_estimate_seconds": ("Smoothed latency, waiting included.", lambda: controller.estimate),
        }
        for name, (what, value) in gauges.items():
            Gauge(name, what, registry=registry).set_function(value)

    def _accuracy(self) -> float:
        accuracy = self._engine.active.accuracy
        return float("nan") if accuracy is None else accuracy

    def answered(self, answer: Answer, latency: float) -> None:
        """A request was answered."""
        self._requests.labels("200").inc()
        self._latency.observe(latency)
        self._run.labels(answer.network).observe(answer.ran)
        self._examples.labels(answer.network).inc(len(answer.outputs))

    def refused(self, status: int) -> None:
        """A request got an answer of another kind."""
        self._requests.labels(str(status)).inc()

    def switched(self, before: str, after: str) -> None:
        """Another network runs from now on."""
        self._active.labels(before).set(0)
        self._active.labels(after).set(1)
        self._switches.labels(after).inc()

    def looked(self, now: float) -> None:
        """Nothing that is counted."""

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
