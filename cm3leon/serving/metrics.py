"""The server's metrics for Prometheus, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """The model and its version, requests by task and status, queue length, batch sizes, seconds in the queue and in the model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.model = Info("cm3leon_model", "the served model and its version in the registry", registry=self.registry)
        self.requests = Counter("cm3leon_requests", "answered requests", ["task", "status"], registry=self.registry)
        self.queue_length = Gauge("cm3leon_queue_length", "requests in the queue", registry=self.registry)
        self.batch_size = Histogram(
            "cm3leon_batch_size", "requests answered together", ["task"], buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.queue_seconds = Histogram("cm3leon_queue_seconds", "seconds in the queue", ["task"], buckets=SECONDS, registry=self.registry)
        self.model_seconds = Histogram("cm3leon_model_seconds", "seconds a batch", ["task"], buckets=SECONDS, registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
