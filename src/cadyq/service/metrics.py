"""What Prometheus is told. One registry per service, so that two in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one service; ``media_type`` is that of `text`."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "cadyq_http_requests_total",
            "Answered requests",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self.waiting = Gauge(
            "cadyq_jobs_waiting", "Jobs that wait, or whose upload goes on", registry=registry
        )
        self.running = Gauge("cadyq_jobs_running", "Jobs that are worked on", registry=registry)
        self.jobs = Counter("cadyq_jobs_total", "Ended jobs", ["state"], registry=registry)
        self.refused = Counter(
            "cadyq_jobs_refused_total", "Jobs refused as the queue was full", registry=registry
        )
        self.wait_seconds = Histogram(
            "cadyq_job_wait_seconds", "Time in the queue", buckets=_SECONDS, registry=registry
        )
        self.work_seconds = Histogram(
            "cadyq_job_work_seconds", "Time of work", buckets=_SECONDS, registry=registry
        )
        self.pixels = Counter("cadyq_output_pixels_total", "Pixels of results", registry=registry)
        self.fqr = Histogram(
            "cadyq_mean_bits",
            "Mean bits (FQR) of results",
            buckets=(0, 2, 3, 4, 4.5, 5, 5.5, 6, 7, 8),
            registry=self._registry,
        )
        self.kept_bytes = Gauge("cadyq_kept_bytes", "Bytes of finished jobs that are kept", registry=registry)

    def text(self) -> bytes:
        """Return the exposition that Prometheus reads."""
        return generate_latest(self._registry)
