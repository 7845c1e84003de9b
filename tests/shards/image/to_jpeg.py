"""A photo as a crawl's worker stores it."""

from __future__ import annotations

from lavic.shards.image.normalize import NormalizedPhoto, PhotoSettings, inspect, normalize


def to_jpeg(data: bytes, settings: PhotoSettings, sha256: str = "") -> NormalizedPhoto:
    return normalize(inspect(data, settings, sha256), settings)
