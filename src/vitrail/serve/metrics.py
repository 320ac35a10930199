"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts since the start, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vitrail_requests", "Requests by endpoint and status", ("endpoint", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "vitrail_request_seconds", "From the head of a request to the end of its answer", ("endpoint",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.images = Counter("vitrail_images", "Images answered, by model", ("model",), registry=self.registry)
        self.waiting = Gauge("vitrail_images_waiting", "Images taken and not yet answered", registry=self.registry)
        self.batches = Histogram("vitrail_batch_images", "Images of a batch", buckets=BATCHES, registry=self.registry)
        self.running = Counter("vitrail_batch_seconds", "Seconds in which a model ran", registry=self.registry)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch that the worker has run."""
        self.batches.observe(images)
        self.running.inc(seconds)

    def text(self) -> bytes:
        """All counts in the text format of Prometheus."""
        return generate_latest(self.registry)
