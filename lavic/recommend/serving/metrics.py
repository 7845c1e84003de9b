"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The counters of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = {"registry": self.registry}
        self.requests = Counter("lavic_requests", "Answers by route and status.", ["route", "status"], **names)
        self.seconds = Histogram(
            "lavic_request_seconds", "From a request's body to its answer.", ["route"], buckets=_SECONDS, **names
        )
        self.waiting = Gauge("lavic_waiting_requests", "Requests that wait for the model.", **names)
        self.batch_size = Histogram(
            "lavic_batch_requests", "Requests of one batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **names
        )
        self.batch_seconds = Histogram("lavic_batch_seconds", "Time of one batch.", buckets=_SECONDS, **names)
        self.dropped = Counter(
            "lavic_dropped_requests", "Requests that were not answered with items, by cause.", ["cause"], **names
        )
        self.reloads = Counter("lavic_reloads", "Changes of bundle or store, by result.", ["result"], **names)
        self.model = Gauge("lavic_model_info", "1 for what is served now.", ["bundle", "store"], **names)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
