"""What /metrics reports, in Prometheus' text format."""

import prometheus_client as prometheus

from fastslm_jax.serve.worker import Worker

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # histogram buckets


class Metrics:
    """Counters of one server; each has its own registry."""

    def __init__(self, worker: Worker):
        registry = self._registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "fastslm_requests", "Requests by status.", ["endpoint", "status"], registry=registry
        )
        self.seconds = prometheus.Histogram(
            "fastslm_request_seconds",
            "Seconds from the first byte of a request to the last of its answer.",
            ["endpoint"],
            registry=registry,
            buckets=SECONDS,
        )
        self.audio = prometheus.Counter(
            "fastslm_audio_seconds", "Seconds of audio in answered requests.", registry=registry
        )
        self.tokens = prometheus.Counter(
            "fastslm_tokens", "Generated tokens of answered requests.", registry=registry
        )
        self.active = prometheus.Gauge(
            "fastslm_active_requests", "Requests that wait or run.", registry=registry
        )
        rows = prometheus.Gauge(
            "fastslm_rows_running", "Rows of the batches in use.", registry=registry
        )
        rows.set_function(lambda: worker.scheduler.rows_running)
        jobs = prometheus.Gauge("fastslm_jobs", "Jobs of the scheduler.", registry=registry)
        jobs.set_function(lambda: len(worker.scheduler.jobs))
        prometheus.ProcessCollector(registry=registry)

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)
