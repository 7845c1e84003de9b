"""The server's counters on Ray Serve: Ray exports those of all replicas, on each node, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve import metrics


class RayInstruments:
    """Makes counters that Ray exports as `ray_NAME`, with tags for deployment and replica; see `Instruments`."""

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> RayInstrument:
        """Of events; exported as `ray_NAME_total`."""
        return RayInstrument(metrics.Counter(name, description, tuple(labels)), labels)

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> RayInstrument:
        """Of a state."""
        return RayInstrument(metrics.Gauge(name, description, tuple(labels)), labels)

    def histogram(
        self, name: str, description: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> RayInstrument:
        """Of sizes or times."""
        return RayInstrument(metrics.Histogram(name, description, list(buckets), tuple(labels)), labels)

    def render(self) -> None:
        """Nothing: a replica knows its own counters alone."""


class RayInstrument:
    """One of them, with the methods that prometheus_client's have."""

    def __init__(self, metric: Any, labels: Sequence[str], tags: Mapping[str, str] | None = None) -> None:
        self._metric, self._labels, self._tags = metric, labels, dict(tags or {})

    def labels(self, *values: object) -> RayInstrument:
        """That of some values of the labels."""
        return RayInstrument(self._metric, self._labels, dict(zip(self._labels, map(str, values), strict=True)))

    def inc(self) -> None:
        """Counts an event."""
        self._metric.inc(tags=self._tags)

    def set(self, value: float) -> None:
        """Sets a state."""
        self._metric.set(value, tags=self._tags)

    def observe(self, value: float) -> None:
        """Takes a size or time."""
        self._metric.observe(value, tags=self._tags)

    def clear(self) -> None:
        """Nothing: a replica serves the same bundle and store as long as it lives."""
