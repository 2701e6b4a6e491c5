"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One registry per service, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        ProcessCollector(**own)
        PlatformCollector(**own)
        self.requests = Counter(
            "pair_requests_total", "Requests answered.", ["route", "status"], **own
        )
        self.seconds = Histogram(
            "pair_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            **own,
        )
        self.received = Counter("pair_received_bytes_total", "Bytes of request bodies.", **own)
        self.refused = Counter("pair_refused_total", "Requests refused.", ["code"], **own)
        self.pictures = Counter("pair_pictures_total", "Pictures computed.", ["work"], **own)
        self.batches = Histogram(
            "pair_batch_pictures", "Pictures computed together.", ["work"], buckets=SIZES, **own
        )
        self.waited = Histogram(
            "pair_queue_seconds", "Longest wait in a batch.", ["work"], buckets=SECONDS, **own
        )
        self.computed = Histogram(
            "pair_compute_seconds", "Time of a batch.", ["work"], buckets=SECONDS, **own
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when Prometheus asks."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def batch(self, work: str, size: int, waited: float, seconds: float) -> None:
        self.pictures.labels(work).inc(size)
        self.batches.labels(work).observe(size)
        self.waited.labels(work).observe(waited)
        self.computed.labels(work).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
