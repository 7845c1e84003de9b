"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Instruments:
    """Makes the counters of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Any:
        return Counter(name, description, labels, registry=self.registry)

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Any:
        return Gauge(name, description, labels, registry=self.registry)

    def histogram(self, name: str, description: str, labels: Sequence[str] = (), *, buckets: Sequence[float]) -> Any:
        return Histogram(name, description, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes | None:
        """All of them in Prometheus' text format; None if something else exports them."""
        return generate_latest(self.registry)


class Metrics:
    """The counters of a server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, instruments: Instruments | None = None) -> None:
        make = instruments or Instruments()
        self.render = make.render
        self.requests = make.counter("lavic_requests", "Answers by route and status.", ["route", "status"])
        self.seconds = make.histogram(
            "lavic_request_seconds", "From a request's body to its answer.", ["route"], buckets=_SECONDS
        )
        self.waiting = make.gauge("lavic_waiting_requests", "Requests that wait for the model.")
        self.batch_size = make.histogram(
            "lavic_batch_requests", "Requests of one batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.batch_seconds = make.histogram("lavic_batch_seconds", "Time of one batch.", buckets=_SECONDS)
        self.dropped = make.counter(
            "lavic_dropped_requests", "Requests that were not answered with items, by cause.", ["cause"]
        )
        self.reloads = make.counter("lavic_reloads", "Changes of bundle or store, by result.", ["result"])
        self.model = make.gauge("lavic_model_info", "1 for what is served now.", ["bundle", "store"])
