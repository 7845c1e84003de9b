"""The server's counters on Ray Serve: Ray exports those of all replicas, on each node, for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.serve import metrics

from lavic.recommend.serving.metrics import Instruments


class RayInstruments(Instruments):
    """Makes counters that Ray exports as `ray_NAME` (of events `ray_NAME_total`), by deployment and replica."""

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> RayInstrument:
        return RayInstrument(metrics.Counter(name, description, tuple(labels)), labels)

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> RayInstrument:
        return RayInstrument(metrics.Gauge(name, description, tuple(labels)), labels)

    def histogram(self, name: str, description: str, labels: Sequence[str] = (), *, buckets: Sequence[float]) -> Any:
        return RayInstrument(metrics.Histogram(name, description, list(buckets), tuple(labels)), labels)

    def render(self) -> None:
        """Nothing: a replica has only its own counters."""


class RayInstrument:
    """One of them, with the methods of prometheus_client's."""

    def __init__(self, metric: Any, labels: Sequence[str], tags: Mapping[str, str] | None = None) -> None:
        self._metric, self._labels, self._tags = metric, labels, dict(tags or {})

    def labels(self, *values: object) -> RayInstrument:
        return RayInstrument(self._metric, self._labels, dict(zip(self._labels, map(str, values), strict=True)))

    def inc(self) -> None:
        self._metric.inc(tags=self._tags)

    def set(self, value: float) -> None:
        self._metric.set(value, tags=self._tags)

    def observe(self, value: float) -> None:
        self._metric.observe(value, tags=self._tags)

    def clear(self) -> None:
        """Nothing: a replica serves the same bundle and store as long as it lives."""
